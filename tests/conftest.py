"""Settings of all tests: one thread, no network, shapes checked at run time.

Knows no test.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from jaxtyping import install_import_hook

# shapes in signatures are checked here and cost users nothing
install_import_hook(["promptuary.methods", "promptuary.prompts", "promptuary.backbones"], "beartype.beartype")

torch.set_num_threads(1)
