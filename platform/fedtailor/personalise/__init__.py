"""An adapter for a client of your own; export."""
