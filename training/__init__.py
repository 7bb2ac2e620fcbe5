"""Everything around the loop: checks before it, evaluation, bad steps, advice on memory, sweeps of runs.

May import: options, launch, quantization, files, data, models, parallel, monitoring, checkpoints, and the
root's quantize_layers.py and wrapping.py. Start in preflight.py: `check_run` finds what is wrong with a run
before a GPU is touched or a file written.
"""
