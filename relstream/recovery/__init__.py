"""What the leader does for all consumers of a service."""
