"""A RUN opened again after training: its answers, its scores, its merged weights.

May import: options, launch, quantization, files, data, models, parallel, monitoring, checkpoints, training, and the
root's quantize_layers.py and wrapping.py.
Start in finished_run.py: `open_run` checks a RUN's folder, `load_model` puts its model on one device.
"""
