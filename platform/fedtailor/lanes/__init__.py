"""Many clients in one forward pass: parameters, batches, layers, the wrapped model, Adam."""
