"""Examples: read from files or the hub, split by seed, padded into batches.

Knows no task, model or method: an example is a mapping from field names to values.
"""
