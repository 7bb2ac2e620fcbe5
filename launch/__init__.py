"""Starts a run, and describes its hardware: processes, nodes, signals, devices, precision, memory in use.

May import: options.
Start in start.py: `start` checks a run and starts it on every rank, in new processes (processes.py) or as a
rank that torchrun has started (torchrun.py).
"""
