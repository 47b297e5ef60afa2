"""Accuracy of ONNX files on real images.

Import from the modules: `pipeline.evaluate.task` opens labelled images of either kind,
`datasets` and `classification`, `box_datasets` and `detection` are the two kinds.
"""
