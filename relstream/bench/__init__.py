"""`python -m relstream.bench`: relstream beside redis-py (docs/internals/benchmarks.md)."""
