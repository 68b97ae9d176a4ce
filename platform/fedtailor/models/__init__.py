"""Base models: where they come from, which of their layers carry adapters, and the embedded tiny BERT."""
