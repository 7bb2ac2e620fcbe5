"""What the server imports of which launch/processes.py forks ranks: all of train.py's, before there is a rank."""

import atexit
import gc
import os

gc.disable()  # a million objects are made that stay: looking through them again and again takes a fifth of the time

import train  # noqa: E402, F401

gc.freeze()
gc.enable()
atexit.register(os._exit, 0)  # taking them down would take another second
