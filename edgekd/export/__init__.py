"""From a torch student to a checked ONNX bundle."""
