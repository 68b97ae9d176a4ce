"""Central differential privacy and its accounting; simulated secure aggregation."""
