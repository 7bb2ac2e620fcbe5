"""Saves results and checkpoints: adapters, model folders, and the state from which a stopped run resumes.

May import: options, launch, quantization, files, data, models, parallel, monitoring, and the root's
quantize_layers.py.
Start in manager.py: `CheckpointManager` decides in the training loop when a checkpoint is saved.
"""
