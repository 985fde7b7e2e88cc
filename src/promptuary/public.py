"""Names of models and data as others may see them: without the folders of somebody's machine.

Knows no file format and no hub, and never imports torch.
"""

from __future__ import annotations

from pathlib import Path


def is_local(name: str) -> bool:
    """Whether a base or a data set is known by a place on somebody's disk and not by a name on the hub."""
    return name.startswith(("pip:", "/", ".", "~")) or name.endswith(".gguf") or Path(name).expanduser().exists()


def public_name(name: str) -> str:
    """The name without the folders of the machine that it lies on."""
    return Path(name).name if is_local(name) and not name.startswith("pip:") else name
