"""`recover`: an ONNX graph run differentiably in torch, and taught what the original computes."""
