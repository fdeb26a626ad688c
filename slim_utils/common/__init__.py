"""Shared by all packages: loading, input checks, output folders, errors."""
