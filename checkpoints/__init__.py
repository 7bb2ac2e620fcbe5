"""What a run saves: adapters and model folders, and the checkpoints that a stopped run goes on from.

May import: options, launch, quantization, files, data, models, parallel, monitoring, and the root's
quantize_layers.py.
Start in manager.py: `Checkpoints` hangs on the loop and says when what is saved.
"""
