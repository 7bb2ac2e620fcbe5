"""From where rows lie to the batches of a step: sources, formats, tokens, packs, batches.

May import: options, launch, files.
Start in sources.py (recipe -> rows) and follow formats.py (row -> text), tokenizing.py (text -> tokens).
"""
