"""safetensors files in and out: model folders, the hub, packed checkpoints, caches, atomic writes, locks.

May import: options, launch, quantization.
Start in model_folder.py: `CheckpointFiles` is a model's folder with every header read and checked.
"""
