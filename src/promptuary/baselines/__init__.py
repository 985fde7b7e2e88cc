"""What prompts are compared with: ways of adapting a model by its own weights, one file each.

Knows no prompt: a baseline is no method, and nothing that it trains can be put on another model.
"""
