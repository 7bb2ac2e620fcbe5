"""Commands on a finished RUN: generate answers, evaluate, export merged weights.

May import: options, launch, quantization, files, data, models, parallel, monitoring, checkpoints, training,
and the root's quantize_layers.py and wrapping.py. Start in finished_run.py: `open_run` checks a RUN's folder,
`load_model` loads its model on one device.
"""
