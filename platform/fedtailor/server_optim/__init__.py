"""Server optimizers: what the server does with the consensus (Reddi et al., 2021)."""
