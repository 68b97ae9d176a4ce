"""Events, progress, status."""
