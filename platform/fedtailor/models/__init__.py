"""Base models: where they come from, which layers carry adapters, how small ones are made."""
