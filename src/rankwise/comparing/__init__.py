"""Which method is best? Methods x settings x seeds x tasks: planned, run once each, chosen, compared, told."""
