"""Local updates that two or more methods use."""
