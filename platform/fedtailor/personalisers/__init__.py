"""How a client's model is made, where two or more methods do it the same way."""
