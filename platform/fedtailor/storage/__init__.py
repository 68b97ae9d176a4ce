"""Files, locks, commits, artifacts and run folders, local or on an object store; the digest of a run."""
