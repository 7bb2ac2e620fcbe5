"""Read data sets and make the batches of each step: sources, formats, tokens, packs, batches.

May import: options, launch, files.
Start in sources.py (recipe -> rows) and follow reading.py (rows -> the columns of one format), examples.py
and formats.py (row -> text), tokenizing.py (text -> tokens in rows.py) and batches.py (rows -> the batches of
a step).
"""
