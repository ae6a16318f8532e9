"""Floor 2: pure GRIFFIN mathematics on tensors; knows no files, devices or models."""
