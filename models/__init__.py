"""Models: one small file per family, adapters, attention, the embedding and the head, the loss.

May import: options, launch, quantization, files, data.
Start in registry.py, which lists FAMILIES and builds a model on the meta device; family.py defines a family.
"""
