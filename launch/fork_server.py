"""Settings of the server process that ranks are forked from. It imports this module before all others."""

import atexit
import gc
import os

# The imports make a million objects that stay alive; scanning them again and again takes a fifth of the time.
# Each rank turns the collector on again (launch/processes.py).
gc.disable()
atexit.register(os._exit, 0)  # an ordinary exit takes a second longer, to unload the libraries
