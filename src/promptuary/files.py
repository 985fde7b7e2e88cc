"""Writing that survives a crash, and reading that refuses damage: temporary name, fsync, rename, sha256.

Knows nothing about what the files mean.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from promptuary.errors import FileFormatError


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        _write_synced(temporary, content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """`write_file` with readable JSON."""
    write_file(path, to_json(content))


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a whole folder under a temporary name, then rename it; an older one of that name is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for name, content in files.items():
            _write_synced(temporary / name, content)
        sync_folder(temporary)
        if path.exists():
            old = path.with_name(f".old-{path.name}-{os.getpid()}")
            path.rename(old)
            try:
                temporary.rename(path)
            except OSError:
                old.rename(path)
                raise
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


def append_line(path: Path, content: Any) -> None:
    """Append one JSON object as a line. A half-written last line, left by a crash, is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
                file.seek(0, os.SEEK_END)
        file.write(to_line(content).encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileFormatError: missing, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileFormatError(f"{path} is missing; this is not a complete folder of promptuary") from None
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise FileFormatError(f"{path} should hold a JSON object")
    return content


def read_tensors(path: Path, sha256: str | None) -> dict[str, Tensor]:
    """Tensors of a safetensors file, checked against its hash and for NaN.

    Raises:
        FileFormatError: missing, damaged, or not finite.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FileFormatError(f"{path} cannot be read: {error.strerror}") from None
    if sha256 is not None and digest(content) != sha256:
        raise FileFormatError(f"{path} is damaged: its content does not match the hash that was saved with it")
    try:
        tensors = safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise FileFormatError(f"{path} is not a safetensors file: {error}") from None
    for name, value in tensors.items():
        if value.dtype.is_floating_point and not bool(value.isfinite().all()):
            raise FileFormatError(f'{path}: tensor "{name}" holds values that are not finite')
    return tensors


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as the bytes of a safetensors file, in the order of their names."""
    return safetensors.torch.save({name: tensors[name].contiguous() for name in sorted(tensors)})


def to_json(content: Any) -> bytes:
    """Readable JSON with a line break at the end."""
    return (json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n").encode()


def to_line(content: Any) -> str:
    """JSON in one line, with the line break."""
    return json.dumps(_finite(content), ensure_ascii=False) + "\n"


def digest(content: bytes) -> str:
    """sha256 in hex."""
    return hashlib.sha256(content).hexdigest()


def sync_folder(path: Path) -> None:
    """Make a rename durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _finite(content: Any) -> Any:
    """JSON knows no NaN and no infinity; they become null."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
