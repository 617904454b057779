"""Convert weights from and to Keras and PyTorch, and to ONNX; make a folder of a model."""
