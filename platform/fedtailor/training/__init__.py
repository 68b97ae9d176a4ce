"""Client-side training that two or more methods use."""
