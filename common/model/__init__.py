"""A run's trainable parameters: heads, trunks, and the open backbones they stand on."""
