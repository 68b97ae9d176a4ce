"""Central differential privacy over clients, its accounting, and simulated secure aggregation."""
