"""From images and features to numbers; nothing here knows a model."""
