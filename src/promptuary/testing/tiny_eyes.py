"""Tiny real vision encoders, random weights, two layers, images of 16 pixels in 16 patches.

Knows no method, task or test; nothing here reads a file or the network.
"""

from __future__ import annotations

import io
from typing import Any

import torch
import transformers
from PIL import Image

from promptuary.types import Sight

_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}

KINDS = ("vit", "dinov2", "registers", "deit", "beit")
"""Architectures: ViT, DINOv2 without and with registers, DeiT (a distillation token), BEiT (biases of attention)."""


def eye(kind: str, seed: int = 0) -> Any:
    """A random encoder of an architecture, in eval mode, with weights large enough that outputs differ."""
    t = transformers
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = {
            "vit": lambda: t.ViTModel(t.ViTConfig(**_VIT)),
            "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**_VIT, mlp_ratio=2)),
            "registers": lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**_VIT, mlp_ratio=2)),
            "deit": lambda: t.DeiTModel(t.DeiTConfig(**_VIT)),
            "beit": lambda: t.BeitModel(t.BeitConfig(**_VIT, use_relative_position_bias=True, use_mean_pooling=False)),
        }[kind]()
        for parameter in made.parameters():
            if parameter.dim() > 1 or float(parameter.detach().abs().max()) == 0:
                parameter.data.normal_(0, 0.06)
    return made.eval()


PROCESSOR = {
    "size": {"height": 16, "width": 16},
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
}
"""The settings of their image processor, as a file has them."""


def picture(seed: int, *, colour: str | None = None) -> bytes:
    """A small random image as the bytes of a PNG file; of a colour, mostly "red" or "blue"."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (20, 24, 3), generator=generator)
    if colour is not None:
        pixels = pixels // 2
        pixels[..., 0 if colour == "red" else 2] += 127
    file = io.BytesIO()
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(file, "PNG")
    return file.getvalue()


def sight() -> Sight:
    """How they want their images."""
    return Sight((16, 16), (16, 16))
