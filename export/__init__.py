"""ONNX: writing verified files, and running them.

`exporter` and `verify` need PyTorch; `session`, `preprocess` and `metadata`, which serving uses, do
not, so this package imports none of its modules.
"""
