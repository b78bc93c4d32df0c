"""The streams that this consumer owns: read, locked, renewed and completed."""
