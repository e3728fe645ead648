"""argv: one verb a file."""
