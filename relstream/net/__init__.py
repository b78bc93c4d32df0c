"""Connections to Redis, made for pipelining and batches."""
