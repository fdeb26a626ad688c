"""Flags, errors and logging of the entry scripts."""
