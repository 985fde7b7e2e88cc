"""Vision encoders (ViT, DeiT, DINOv2, BEiT): an image becomes a vector, which a head reads.

Knows no method, task or data set.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from promptuary.backbones import load
from promptuary.backbones.base import Backbone, BackboneConfig, Prompts, pick_device
from promptuary.backbones.inject import noting
from promptuary.backbones.seeing import Seeing, opening, settings_of, sight_of
from promptuary.backbones.vocabulary import NoWords
from promptuary.errors import ConfigError
from promptuary.types import Batch, Prompt, Shape, Sight


class Vision(Seeing):
    """A vision encoder without a text side."""

    name = "vision"
    loader: ClassVar[Any] = transformers.AutoModel
    abilities = frozenset({"pool"})
    pooling = "first"
    sites = frozenset({"layers", "norms"})

    @property
    def eye(self) -> Any:
        """The model itself."""
        return self.model

    def read_with(self, reader: Any) -> None:
        """Take the image processor of transformers, its settings, or a `Sight`.

        Raises:
            SiteError: it is none of these.
        """
        self.pad, self.prefix, self.suffix, self.tokenizer = 0, (), (), None
        if not isinstance(reader, Sight):
            values = settings_of(reader, type(self.model).__name__)
            reader = sight_of(values, self.model.config.to_dict(), self.config.image_size)
        self.sight = reader

    def find_shape(self) -> Shape:
        """Widths of the tower."""
        self.vocabulary = NoWords(type(self.model).__name__)
        self.wire_eye()
        width = int(self.table.weight.shape[0])
        facts, depth = self._facts(), len(self.blocks)
        heads = int(facts.get("num_attention_heads") or 1)
        return Shape(
            width,
            depth,
            heads,
            width // heads,
            hidden=width,
            visual=width,
            depth=depth,
            patch=self.patch,
            norms=len(self.norms),
        )

    @classmethod
    def load(cls, config: BackboneConfig) -> Backbone:
        """Load the model and the settings of its image processor.

        Raises:
            ConfigError: not found or not readable.
        """
        source, options, settings = opening(config)
        found = load.from_pretrained(transformers.AutoConfig, source, "config", **options)
        # MAE's own model hides patches by chance; what it trained is a ViT
        loader = transformers.ViTModel if found.model_type == "vit_mae" else cls.loader
        options["dtype"] = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        model = load.whole_model(loader, source, f"{cls.name} model", **options)
        return cls(model.to(pick_device(config.device)), settings, config)

    # ---- what it does -----------------------------------------------------------------------------------------------

    def hidden(self, batch: Batch, prompts: Prompts) -> Float[Tensor, "b t h"]:
        """Last hidden states of special tokens and patches."""
        return self.each(batch, prompts, self._hidden)

    def _hidden(self, batch: Batch, prompt: Prompt) -> Float[Tensor, "b t h"]:
        return self.without_rows(self._states(batch, prompt), prompt)

    def _states(self, batch: Batch, prompt: Prompt) -> Float[Tensor, "b n h"]:
        with self.seeing(prompt):
            states: Tensor = self.look(self.model, batch.pixels).last_hidden_state
        return states

    def pooled(self, batch: Batch, prompts: Prompts) -> Float[Tensor, "b h"]:
        """One vector per image: the class token, the mean of the patches, or that of patches and prompt rows."""
        return self.each(batch, prompts, self._pooled)

    def _pooled(self, batch: Batch, prompt: Prompt) -> Float[Tensor, "b h"]:
        known = self.known(batch, prompt)
        if known is not None:
            return known
        how = self.pooling if self.config.pooling == "auto" else self.config.pooling
        if how == "first":
            return self._states(batch, prompt)[:, 0]
        if how == "mean":
            return self._hidden(batch, prompt)[:, self.lead :].float().mean(1)
        if how == "all":  # MAE: the mean is taken before the norm
            norm, before = self.last_norm, list[Tensor]()
            with noting([norm], before):
                self._states(batch, prompt)
            return norm(before[-1][:, self.lead :].float().mean(1).to(before[-1].dtype))
        raise ConfigError(f"backbone.pooling: {how} is for texts; the vision family takes first, mean or all")

    @property
    def last_norm(self) -> Any:
        """The norm behind the last layer."""
        inner = {part for block in self.blocks for part in block.modules()}
        norms = [part for part in self.model.modules() if isinstance(part, torch.nn.LayerNorm) and part not in inner]
        return norms[-1]

    def answer_in(self, batch: Batch, states: Float[Tensor, "b t h"]) -> Float[Tensor, "b h"] | None:
        """It is read elsewhere, since a row of a prompt may have a part in it."""
        return None
