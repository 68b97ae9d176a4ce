"""Tasks: one file per data set, the partition into clients, tokens. Knows no model and no method."""
