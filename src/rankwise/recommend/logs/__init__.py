"""Logs of interactions: read from files of any kind and length, cleaned, split and sorted by user."""
