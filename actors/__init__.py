"""The only importer of Ray core: actors, their placement, and the pool that feeds them."""
