"""What an example means, one kind of task per file; data sets are YAML files in `suites/`.

Knows no prompt, method or backbone.
"""
