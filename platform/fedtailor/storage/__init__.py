"""Files, locks, commits, artifacts, run folders, digest."""
