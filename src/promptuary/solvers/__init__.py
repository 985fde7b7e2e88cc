"""How a prompt gets better.

Knows no method, family, task or data set by name.
"""
