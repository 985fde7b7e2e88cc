"""Settings of all tests: one thread, no network, shapes checked at run time.

Knows no test.
"""

from __future__ import annotations

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import torch
from jaxtyping import install_import_hook

# shapes in signatures are checked here and cost users nothing
install_import_hook(["promptuary.methods", "promptuary.prompts", "promptuary.backbones"], "beartype.beartype")

torch.set_num_threads(1)

# how long an example takes says something about the machine, nothing about the code
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.load_profile("here")

# a shell starts what stands in its background with these ignored, and a process that ignores them is left alone
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)
