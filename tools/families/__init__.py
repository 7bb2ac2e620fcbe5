"""Parts of tools.try_family: a tiny model of any type, its Family by experiment, and the comparisons.

Start in derive.py.
"""
