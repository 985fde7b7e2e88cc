"""Many prompts on one model: requests for any of them are answered in common batches.

Knows no training.
"""
