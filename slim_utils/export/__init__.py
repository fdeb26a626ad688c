"""Formats of other engines."""
