"""A Redis Cluster: its slots, and commands to its masters."""
