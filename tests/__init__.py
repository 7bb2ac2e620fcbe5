"""Run Python's garbage collector less often in the tests and in their ranks, whose fork server imports this.

It would search the million objects of the libraries again and again: a tenth of the tests' time.
"""

import gc

gc.set_threshold(20_000, 20, 20)
