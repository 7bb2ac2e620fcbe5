"""Tools for developers: they write files of the repository, check it, or crash a run on purpose.

May import everything. Each is run by itself: `python -m tools.NAME`.
"""
