"""What a cache costs in quality, measured on a pretrained model: the model, the texts, the measurement."""
