"""What a step does over several GPUs or within one: activation checkpointing and offload, collectives,
compiler passes, optimizers, and the shards of parameters.

May import: options, launch, quantization, files, data, models.
Start in activation_checkpointing.py, then read wrapping.py, which puts all of it around a model.
"""
