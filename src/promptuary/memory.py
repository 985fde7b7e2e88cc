"""Out of memory: telling it from other errors, trying something that may need too much, and the most that was used.

Knows no model, and nothing of what is made smaller.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

SIGNS = ("DefaultCPUAllocator", "out of memory", "_ALLOC_FAILED")
"""Parts of the messages by which the CPU's allocator, other accelerators and cuBLAS say in a RuntimeError what CUDA's
allocator says in a class of its own."""


def ran_out(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def attempt(call: Callable[[], T]) -> T | None:
    """What the call gives; None if memory ran out, with everything that it held given back."""
    try:
        return call()
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    # behind the handler, where the traceback no longer holds the tensors of what failed
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def forget_peak(device: torch.device) -> None:
    """Let `peak` count from here on, where the system can do that; what is in use now counts in any case."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # Linux alone has it, and a container may forbid it
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak(device: torch.device) -> int:
    """Most bytes in use so far: of the accelerator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
