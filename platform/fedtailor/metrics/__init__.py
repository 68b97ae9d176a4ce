"""Measures of answers, and means that can be joined."""
