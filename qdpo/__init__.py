"""qdpo: preference tuning of 7B-13B language models on one consumer GPU."""

__version__ = "0.1.0"
