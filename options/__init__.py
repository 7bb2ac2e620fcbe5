"""The options of all commands: each declared once, read from the command line or from YAML, and validated.

May import: nothing of this project, and no torch, so that --help and wrong options are answered at once.
Start in config.py, which declares the options of train.py; methods.py defines the train types.
"""
