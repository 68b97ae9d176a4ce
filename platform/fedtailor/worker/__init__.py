"""Workers: they open a stage, play its segments, score personalised models; the pool in this process."""
