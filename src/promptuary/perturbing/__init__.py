"""Small changes of a text that leave its meaning alone: typos, other words, another syntax; by rule, or by a model.

Knows no prompt, task or backbone.
"""
