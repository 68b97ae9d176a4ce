"""Server optimizers of Reddi et al. (2021), 'Adaptive Federated Optimization'."""
