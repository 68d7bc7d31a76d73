"""`python -m rankwise`, which torchrun and accelerate start: the command line."""

import sys

from rankwise.cli import main

sys.exit(main())
