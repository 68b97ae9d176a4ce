"""Adapters: what is trainable in a client's model, and the scope of each parameter."""
