"""Simulation of personalised federated fine-tuning of language models."""

__version__ = "0.1.0"
NUMERICS_VERSION = 1
"""Raised by hand whenever equal configurations may give other numbers; part of every artifact hash."""
