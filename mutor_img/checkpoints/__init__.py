"""Files of a model: checkpoints, tensors, loading, and the names of LlamaGen's released weights."""
