"""Simulation of personalised federated fine-tuning of language models."""

import logging

__version__ = "0.1.0"
NUMERICS_VERSION = 1
"""Raised by hand whenever equal configurations may give other numbers; part of every artifact hash."""

# transformers imports deepspeed where it is installed, and that says on stdout, of all places, that there is no GPU.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
