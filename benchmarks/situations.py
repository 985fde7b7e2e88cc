"""Everyday situations for a prompt on a frozen model, all of them.

Knows nothing itself: running.py and keeping.py have them, and each adds its own to the list.
"""

from __future__ import annotations

import keeping  # noqa: F401
import running  # noqa: F401
from measure import SITUATIONS

__all__ = ["SITUATIONS"]
