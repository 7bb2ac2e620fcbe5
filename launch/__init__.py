"""How a run is started and what it runs on: rank processes, nodes, signals, devices, precision, memory in use.

May import: options.
Start in processes.py: `start` makes one process per GPU, `join` makes this one a rank of torchrun's.
"""
