"""Aggregators: how a cohort's SHARED parameters become one consensus."""
