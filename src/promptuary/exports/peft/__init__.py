"""PEFT's folders, both ways: `adapter_config.json` beside `adapter_model.safetensors`.

Knows nothing itself: `writing.py` and `reading.py` do the work.
"""

from promptuary.exports.peft.reading import Adapter, base_of, load, read
from promptuary.exports.peft.writing import write

__all__ = ["Adapter", "base_of", "load", "read", "write"]
