"""Federated rounds: the contract of a method, what a client function gets, the only loop over rounds."""
