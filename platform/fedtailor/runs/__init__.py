"""Run folders, commits, resume, trackers and reports."""
