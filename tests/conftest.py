"""Settings of all tests: one thread, no network, shapes checked at run time.

Knows no test.
"""

from __future__ import annotations

import gc
import os
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import torch

import shape_checks

# what is compiled once is kept, also by the processes that tests start: a new checkout has no bytecode of the library
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# shapes in signatures are checked here and cost users nothing
shape_checks.install(["promptuary.methods", "promptuary.prompts", "promptuary.backbones"])

torch.set_num_threads(1)

# how long an example takes says something about the machine, nothing about the code
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.load_profile("here")

# a shell starts what stands in its background with these ignored, and a process that ignores them is left alone
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)


def pytest_collection_finish() -> None:
    """A million objects of modules and tests stay to the end: the collector need not walk them again and again."""
    gc.collect()
    gc.freeze()
