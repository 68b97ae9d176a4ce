"""Ownership, messages, lanes, the worker and the only loop over rounds."""
