"""Several runs side by side: what differs between them, their results, and tests on clients that they share."""
