"""Mergeable metrics."""
