"""The VQ tokenizer: train, encode, reconstruct and inspect, and the network itself."""

from tokenizer.loading import load_tokenizer

__all__ = ["load_tokenizer"]
