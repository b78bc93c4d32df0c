"""`python -m relstream.bench`: relstream beside redis-py at the same work (docs/benchmarks.md)."""
