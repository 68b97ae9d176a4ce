"""What a run tells while it works and afterwards: events, progress, status; where the W&B key comes from."""
