"""The CUDA path of the project on a machine without a device: tensors that claim to be there and hold no numbers."""
