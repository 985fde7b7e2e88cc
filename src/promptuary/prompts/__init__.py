"""Reusable parts of methods in pure torch: how a prompt starts, and the blocks that it is built from.

Knows no model, tokenizer or file.
"""
