"""A prompt for a transformers model that the host holds and trains by its own code.

Knows no task, file or training loop.
"""

from __future__ import annotations

from typing import Any

import torch

from promptuary import registry
from promptuary.building import build_method, hold_backbone
from promptuary.errors import PromptuaryError
from promptuary.sources import load_start
from promptuary.tuned import Tuned


def adapt(
    model: Any, tokenizer: Any, method: str = "ept", *, family: str = "auto", seed: int = 0, **settings: Any
) -> Tuned:
    """A fresh prompt for a transformers model that you hold, to be trained by your own code.

    For example::

        tuned = promptuary.adapt(model, tokenizer, "ept", num_virtual_tokens=20)
        with tuned.attach(train=True):
            ...  # your loop or transformers.Trainer; tuned.parameters() are what is trained
        promptuary.save_prompt(tuned, "folder")

    The model is frozen until `tuned.backbone.release()`. A head of your own (`model.classifier`) may be set to be
    trained again afterwards.

    Args:
        model: any text model of transformers.
        tokenizer: its fast tokenizer.
        method: name of the method.
        family: of the model; auto reads its class.
        seed: of the first values.
        settings: the method's own settings. On models with a head that reads position 0 the rows stand behind the
            first special token unless `placement` says otherwise (our choice).

    Raises:
        ConfigError: no such method or setting, or the class of the model belongs to no family.
        SiteError: the model has no place for a prompt.
    """
    found = registry.load("methods", method)
    backbone = hold_backbone(model, tokenizer, family=family)
    if backbone.name == "encoder":
        settings = {"placement": "after_bos", **settings}
    try:
        config = found.Config.read({"name": method, **settings}, where="method")
        made = build_method(config, backbone.shape)
        tuned = Tuned(backbone, None, made)
        return tuned.initialise(torch.Generator().manual_seed(seed), *load_start(made.config, backbone))
    except PromptuaryError:
        backbone.release()
        raise
