"""Codes from a model: cached decoding on CPUs and GPUs, guidance, and the random stream of each sample."""
