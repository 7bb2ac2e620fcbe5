"""Observation of a run: metrics, progress, profiles, the report, and the model of its memory.

May import: options, launch, quantization, files, data, models, parallel.
Start in metrics.py: `Metrics` is a line of metrics.jsonl. tracking.py prints and writes it.
"""
