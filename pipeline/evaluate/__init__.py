"""Accuracy of ONNX files on real images.

Import from the modules: `pipeline.evaluate.datasets` and `pipeline.evaluate.classification`.
"""
