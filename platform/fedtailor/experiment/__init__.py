"""The configuration tree, its rules, the graph of stages, running it, planning it."""
