"""What a step does over several GPUs or within one: activation checkpointing and offload, collectives, compiler
passes, optimizers.

May import: options, launch, quantization, files, data, models. The two root modules quantize_layers.py and wrapping.py
stand behind it.
Start in activation_checkpointing.py, then read wrapping.py, which puts all of it around a model.
"""
