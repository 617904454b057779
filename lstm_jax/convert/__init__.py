"""Convert weights from and to PyTorch; make a folder of a model."""
