"""The engine: one training loop for every model. It knows no model."""
