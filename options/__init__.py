"""Every option of every command: declared once, read from the command line and from YAML, and validated.

May import: nothing of this project, and no torch, so that --help and wrong options are answered at once.
Start in config.py, which declares the options of train.py; methods.py says what each train type is.
"""
