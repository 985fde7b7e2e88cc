"""The tiny real models of `promptuary.testing.tiny`, under the short name that the tests use.

Knows nothing itself.
"""

from promptuary.testing.tiny import FAMILIES, FAMILY, SIZE, SPECIAL, WIDTH, WORDS, backbone, model, save, tokenizer

__all__ = ["FAMILIES", "FAMILY", "SIZE", "SPECIAL", "WIDTH", "WORDS", "backbone", "model", "save", "tokenizer"]
