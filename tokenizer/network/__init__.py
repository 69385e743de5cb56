"""The VQ network: encoder, codebook, decoder."""
