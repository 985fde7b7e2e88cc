"""PEFT's file names, tensor names and quirks, as of PEFT 0.21.2.

Knows no prompt of ours; the package peft itself is not imported.
"""

from __future__ import annotations

CONFIG, TENSORS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
ROWS, COLUMN_FACTORS, ROW_FACTORS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
FACTS = "promptuary"
"""Our own entry in PEFT's config; PEFT warns that it does not know it and goes on."""

PEFT_VERSION = "0.21.2"
"""Whose layout is written."""


def read_by(layers: int) -> list[int]:
    """Which of the stored layers PEFT 0.21.2 hands to each layer of an encoder-decoder's decoder.

    It puts the whole tensor behind itself and then gives each layer four parts in a row, two of which are thrown away.
    """
    return [2 * layer % layers for layer in range(layers)]
