"""How a run is started and what it runs on: processes, nodes, signals, devices, precision, memory in use.

May import: options.
Start in start.py: `start` checks a run and has its ranks run it, in new processes (processes.py) or as
torchrun's (torchrun.py).
"""
