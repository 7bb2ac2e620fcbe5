"""Parts of a training step on one GPU or several.

They are activation checkpointing and offload, collectives, compiler passes, optimizers, and shards of
parameters.

May import: options, launch, quantization, files, data, models.
Start in activation_checkpointing.py, then read wrapping.py, which puts all of it around a model.
"""
