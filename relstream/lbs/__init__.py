"""One load balancer stream: its names, entries, locks and dead letters."""
