"""Python's collector looks through the libraries' million objects again and again while they are made: a tenth of the
tests' time. It does so less often here, in the tests' processes and in the ranks' (whose fork server imports this)."""

import gc

gc.set_threshold(20_000, 20, 20)
