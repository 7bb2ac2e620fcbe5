"""What a model is made of: a small file per family, adapters, the embedding and the head, the loss, attention.

May import: options, launch, quantization, files, data.
Start in registry.py: FAMILIES, and how a model is built on the meta device; family.py says what a family is.
"""
