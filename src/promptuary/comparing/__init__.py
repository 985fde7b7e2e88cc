"""Comparing methods: a job of many runs, how it is worked off, and what its scores show.

Importing it loads neither torch nor transformers.
"""
