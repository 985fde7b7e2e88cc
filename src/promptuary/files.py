"""Writing that survives a crash, and reading that refuses damage: temporary name, fsync, rename, sha256.

Knows nothing about what the files mean. Slightly longer than most files, so that every way of writing stands beside
every way of reading.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from promptuary.errors import FileFormatError, StorageError

JSON_LIMIT = 4 * 2**20
"""Most bytes of a JSON file that is read; room for some ten thousand labels (our choice)."""

TENSOR_ROOM = 2**16
"""Bytes that names and shapes may take in a tensor file, beside the numbers (our choice)."""

BLOCK = 4096
"""Bytes that a disk gives out at once, on nearly all of them; only for what a message says."""

DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool}
)
"""What a tensor file may hold."""

_ASIDE = re.compile(r"\.(tmp|old)-(.+?)-(\d{1,9})(?:-[0-9a-f]{8})?", re.DOTALL)
"""Names that exist only while something is written: kind, name, process."""


# ---- writing --------------------------------------------------------------------------------------------------------


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old or the new one, never a half.

    Raises:
        StorageError: it cannot be written; the old one is still there.
    """
    with _reporting(path, len(content)):
        _make_folder(path.parent)
        temporary = _aside(path, "tmp")
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
    """Write a whole folder under a temporary name, then give it its own; an older one of that name is replaced.

    Raises:
        StorageError: it cannot be written; the old one is still there.
    """
    with _reporting(path, *map(len, files.values())):
        _make_folder(path.parent)
        sweep(path.parent, path.name)
        temporary = _aside(path, "tmp")
        temporary.mkdir()
        try:
            for name, content in files.items():
                _write_synced(temporary / name, content)
            sync_folder(temporary)
            _put(temporary, path)
        finally:
            # by now this may be the old folder
            _remove(temporary)


def append_line(path: Path, content: Any) -> None:
    """Append one JSON object as a line. A half-written last line, left by a crash, is cut off first.

    Raises:
        StorageError: it cannot be written; earlier lines are still there.
    """
    line = to_line(content).encode()
    with _reporting(path, len(line)):
        how = os.O_RDWR | os.O_CREAT | os.O_APPEND
        try:
            handle = os.open(path, how, 0o666)
        except FileNotFoundError:
            _make_folder(path.parent)
            handle = os.open(path, how, 0o666)
        with open(handle, "rb+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    end = file.read().rfind(b"\n") + 1
                    file.truncate(end)
            try:
                _write_all(handle, line)
            except OSError:
                file.truncate(end)
                raise


def sweep(folder: Path, name: str | None = None, *, mine: bool = False) -> None:
    """Clear away what processes left that died while writing; what a living one writes is not touched.

    An old folder whose place is empty is put back: its process died between two renames.

    Args:
        folder: where to look; not below it.
        name: only what belongs to this name.
        mine: the caller is not writing here, so that what carries its own number is from a dead process too.
    """
    for item in sorted(folder.glob(".*")):
        found = _ASIDE.fullmatch(item.name)
        if found is None or name not in (None, found[2]) or _alive(int(found[3]), mine):
            continue
        if found[1] == "old" and not os.path.lexists(folder / found[2]):
            item.rename(folder / found[2])
        else:
            _remove(item)


def standing(path: Path) -> Path:
    """A folder, or, in the moment in which it is being replaced, the old one that stands aside."""
    if not os.path.lexists(path):
        for item in sorted(path.parent.glob(".old-*")):
            found = _ASIDE.fullmatch(item.name)
            if found is not None and found[2] == path.name:
                return item
    return path


# ---- reading --------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileFormatError: missing, a link, too large, not JSON, or not an object.
    """
    content = read_bytes(path, JSON_LIMIT)
    try:
        found = json.loads(content, object_pairs_hook=_unique, parse_constant=_no_constant)
        canonical(found)
    except RecursionError:
        raise FileFormatError(f"{path} cannot be read as JSON: it is nested too deeply") from None
    except ValueError as error:
        raise FileFormatError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise FileFormatError(f"{path} should hold a JSON object")
    return found


def read_tensors(path: Path, sha256: str | None, *, limit: int | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file, checked against its hash and for NaN.

    Args:
        path: the file.
        sha256: of its content, if it is known.
        limit: most bytes that it may have; a larger file is refused before it is read.

    Raises:
        FileFormatError: missing, a link, too large, damaged, or not finite.
    """
    content = read_bytes(path, limit)
    if sha256 is not None and digest(content) != sha256:
        raise FileFormatError(f"{path} is damaged: its content does not match the hash that was saved with it")
    try:
        tensors = safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FileFormatError(f"{path} is not a safetensors file: {reason}") from None
    for name, value in tensors.items():
        if value.dtype not in DTYPES:
            raise FileFormatError(f"{path}: tensor {_quoted(name)} holds {value.dtype}, which no part of a prompt is")
        if value.dtype.is_floating_point and not bool(value.isfinite().all()):
            raise FileFormatError(f"{path}: tensor {_quoted(name)} holds values that are not finite")
    return tensors


def read_bytes(path: Path, limit: int | None = None) -> bytes:
    """The content of an ordinary file; links are not followed, and nothing else is opened or waited for.

    Raises:
        FileFormatError: missing, a link or another kind of file, or larger than `limit` bytes.
    """
    try:
        with open(path, "rb", opener=_open_plain) as file:
            size = os.fstat(file.fileno()).st_size
            if limit is not None and size > limit:
                raise FileFormatError(f"{path} has {size:,} bytes, but at most {limit:,} belong there; it is not read")
            content = file.read(size)
    except FileNotFoundError:
        raise FileFormatError(f"{path} is missing; this is not a complete folder of promptuary") from None
    except OSError as error:
        reason = "it is a link; put the file itself there" if error.errno == errno.ELOOP else error.strerror
        raise FileFormatError(f"{path} cannot be read: {reason}") from None
    except ValueError as error:
        raise FileFormatError(f"{str(path)!r} cannot be read: {error}") from None
    return content


# ---- content --------------------------------------------------------------------------------------------------------


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same JSON object with a `checksum` of all the rest."""
    plain = json.loads(to_json(content))
    return {**plain, "checksum": digest(canonical(plain))}


def check_seal(path: Path, content: Mapping[str, Any]) -> None:
    """Compare a JSON object with its `checksum`.

    Raises:
        FileFormatError: it is missing or does not match.
    """
    rest = {name: value for name, value in content.items() if name != "checksum"}
    if content.get("checksum") != digest(canonical(rest)):
        raise FileFormatError(
            f"{path} is damaged or was edited: its content does not match the checksum in it; use a whole copy"
        )


def canonical(content: Any) -> bytes:
    """JSON in one form: keys sorted, no spaces, UTF-8, numbers as Python writes them."""
    return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


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


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of tensors, names and shapes included; empty where there are none."""
    return digest(tensor_bytes({name: value.cpu() for name, value in tensors.items()})) if tensors else ""


def sync_folder(path: Path) -> None:
    """Make a rename durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- helpers --------------------------------------------------------------------------------------------------------


def _finite(content: Any) -> Any:
    """JSON knows no NaN and no infinity; they become null."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content


@contextlib.contextmanager
def _reporting(path: Path, *sizes: int) -> Iterator[None]:
    """The operating system's refusal as one line that names the file."""
    try:
        yield
    except OSError as error:
        room = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = sum(-(-size // BLOCK) * BLOCK for size in sizes)
            room = f" ({needed:,} bytes are needed{_free(path)}); free some and start again"
        raise StorageError(f"{path} cannot be written: {error.strerror or error}{room}") from error


def _free(path: Path) -> str:
    for folder in path.parents:
        with contextlib.suppress(OSError):
            return f", {shutil.disk_usage(folder).free:,} are free"
    return ""


def _aside(path: Path, kind: str) -> Path:
    """A name beside `path` that no other process or thread uses."""
    return path.with_name(f".{kind}-{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def _alive(process: int, mine: bool) -> bool:
    if process == os.getpid():
        return not mine
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _make_folder(path: Path) -> None:
    """A folder and those around it, as durable as what will be in it."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    if made:
        path.mkdir(parents=True, exist_ok=True)
    for folder in made:
        sync_folder(folder.parent)


def _put(temporary: Path, path: Path) -> None:
    """Give a finished folder its name; what had the name before takes the temporary one, or is removed."""
    if not os.path.lexists(path):
        temporary.rename(path)
    elif not path.is_dir() or path.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "a file or a link of that name is in the way")
    elif not _exchange(temporary, path):
        old = _aside(path, "old")
        path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            old.rename(path)
            raise
        try:
            sync_folder(path.parent)
        finally:
            _remove(old)
        return
    sync_folder(path.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in a single step; False where the system cannot (it is Linux that can)."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code))


def _remove(path: Path) -> None:
    """Take away what nobody needs any more; what cannot go now is swept later."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _open_plain(path: str, flags: int) -> int:
    """Neither through a link nor waiting for the other end of a pipe."""
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not an ordinary file")
    return handle


def _write_synced(path: Path, content: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        _write_all(handle, content)
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_all(handle: int, content: bytes) -> None:
    """All bytes; the system may take them in pieces."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; with a name twice, readers would disagree on what it says."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _quoted(name: str) -> str:
    """A name from a file, in quotes and short."""
    return json.dumps(name if len(name) <= 80 else f"{name[:80]}...")
