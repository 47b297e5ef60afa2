"""The product: generate images, quantize, verify, evaluate and report."""
