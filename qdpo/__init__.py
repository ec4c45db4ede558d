"""qdpo: preference tuning of 7B-13B language models on one consumer GPU."""

__version__ = "0.2.0.dev0"
