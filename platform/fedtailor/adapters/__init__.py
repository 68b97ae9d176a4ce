"""What is trainable in a client's model, and who owns it."""
