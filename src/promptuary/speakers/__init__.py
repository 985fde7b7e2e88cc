"""Models that are talked to: one method, whether the model is behind an endpoint, on this machine, or a script.

Knows no prompt, task or method.
"""
