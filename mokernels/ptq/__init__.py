"""Post-training quantization: from a float model to the layers that a checkpoint holds."""
