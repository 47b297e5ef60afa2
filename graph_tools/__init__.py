"""ONNX graphs: load, find BatchNormalization, run differentiably, write and read Q/DQ.

Knows nothing of generation, calibration or files of runs, and never imports ``pipeline``.
"""
