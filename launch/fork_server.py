"""Settings of the server that ranks are forks of. It imports this first, and then what ranks need."""

import atexit
import gc
import os

# A million objects are made that stay: looking through them again and again takes a fifth of the time. A rank turns the
# collector on again (launch/processes.py).
gc.disable()
atexit.register(os._exit, 0)  # taking the libraries down would take another second
