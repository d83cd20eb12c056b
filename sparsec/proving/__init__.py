"""verify: an artifact against ONNX Runtime, and how far two correct implementations may differ."""
