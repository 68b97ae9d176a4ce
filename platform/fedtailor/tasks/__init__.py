"""Data: sources of labelled text, their partition into clients, and the tokenised store."""
