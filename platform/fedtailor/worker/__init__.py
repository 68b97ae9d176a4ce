"""Runs segments of a stage, wherever it lives; the pool in this process."""
