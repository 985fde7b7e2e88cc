"""Frozen pretrained models, one family per file, seen as places where a prompt can go.

Knows no method, task or data set.
"""
