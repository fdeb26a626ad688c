"""Export to the formats of other engines."""
