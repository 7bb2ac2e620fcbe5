"""What a run tells of itself: metrics, progress, profiles, the report, and the model of its memory.

May import: options, launch, quantization, files, data, models, parallel, and the root's wrapping.py.
Start in tracking.py: `Metrics` is a line of metrics.jsonl, and a tracker what shows and writes it.
"""
