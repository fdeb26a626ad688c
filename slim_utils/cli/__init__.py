"""Command line of the entry scripts: flags, errors, logging."""
