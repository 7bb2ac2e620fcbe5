"""Every option of every command: declared once, read from the command line and from YAML, and validated.

May import: nothing of this project, and no torch, so that --help and wrong options are answered at once.
Start in config.py: METHODS says what each train type is, and Config declares the options of train.py.
"""
