"""Two-tower models (CLIP, SigLIP, pairs of BERT and ViT): an image is compared with a text for each class.

Knows no method, task or data set. The words of a class may have a learned context; the image may have rows of a prompt.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any, ClassVar

import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from promptuary.backbones import load
from promptuary.backbones.base import Backbone, BackboneConfig, Prompts, pick_device
from promptuary.backbones.kept import stamp_of
from promptuary.backbones.seeing import Seeing, opening, settings_of, sight_of
from promptuary.backbones.tower import Tower, tower_of
from promptuary.backbones.vocabulary import TableVocabulary
from promptuary.errors import SiteError
from promptuary.types import Batch, Candidates, Prompt, Shape, Sight


class Dual(Seeing):
    """A vision tower and a text tower with features of one width."""

    name = "dual"
    loader: ClassVar[Any] = transformers.AutoModel
    abilities = frozenset({"words", "pool", "texts"})
    pooling = "first"
    sites = frozenset({"layers", "norms", "context"})

    @property
    def eye(self) -> Any:
        """The vision tower."""
        return self.model.vision_model

    def read_with(self, reader: Any) -> None:
        """Take a processor of transformers, or tokenizer and image settings.

        Raises:
            SiteError: it is neither, or the tokenizer is not a fast one.
        """
        if isinstance(reader, transformers.ProcessorMixin):
            reader = (reader.tokenizer, reader.image_processor)
        if not isinstance(reader, tuple):
            raise SiteError(
                f"{type(self.model).__name__} reads and sees: give its processor, or its tokenizer and image processor "
                f"as a pair; {type(reader).__name__} is neither"
            )
        tokenizer, image = reader
        if not tokenizer.is_fast:
            raise SiteError(
                f"{type(tokenizer).__name__} is not a fast tokenizer; install one that has a tokenizer.json"
            )
        if not isinstance(image, Sight):
            values = settings_of(image, type(self.model).__name__)
            image = sight_of(values, self.eye.config.to_dict(), self.config.image_size)
        self.tokenizer, self.sight = tokenizer, image
        self.pad, self.prefix, self.suffix = 0, (), ()

    def find_shape(self) -> Shape:
        """Widths of both towers."""
        config = self.config
        self.wire_eye()
        self.tower: Tower = tower_of(self.model, self.tokenizer, truncate=config.narrow_head, share=config.share_prefix)
        table = self.model.text_model.get_input_embeddings()
        self.vocabulary = TableVocabulary(table, self.tokenizer, self.keys_values)
        visual = int(self.table.weight.shape[0])
        return Shape(
            self.tower.width,
            self.tower.layers,
            hidden=self.tower.hidden,
            vocabulary=int(table.weight.shape[0]),
            visual=visual,
            depth=len(self.blocks),
            patch=self.patch,
            norms=0 if self.norm_values() is None else len(self.norms),
        )

    def reader_hash(self) -> str:
        """Of the vocabulary, and of how images are prepared."""
        both = load.tokenizer_hash(self.tokenizer) + super().reader_hash()
        return hashlib.sha256(both.encode()).hexdigest()[:16]

    @classmethod
    def load(cls, config: BackboneConfig) -> Backbone:
        """Load the model, its tokenizer and the settings of its image processor.

        Raises:
            ConfigError: not found or not readable.
        """
        source, options, settings = opening(config)
        tokenizer = load.from_pretrained(transformers.AutoTokenizer, source, "tokenizer", **options)
        load.check_tokenizer(tokenizer, source)
        options["dtype"] = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        model = load.whole_model(cls.loader, source, f"{cls.name} model", **options)
        return cls(model.to(pick_device(config.device)), (tokenizer, settings), config)

    # ---- images -----------------------------------------------------------------------------------------------------

    def hidden(self, batch: Batch, prompts: Prompts) -> Float[Tensor, "b t h"]:
        """Last states of the vision tower, of special tokens and patches."""
        return self.each(batch, prompts, self._hidden)

    def _hidden(self, batch: Batch, prompt: Prompt) -> Float[Tensor, "b t h"]:
        with self.seeing(prompt):
            states = self.look(self.eye, batch.pixels).last_hidden_state
        return self.without_rows(states, prompt)

    def pooled(self, batch: Batch, prompts: Prompts) -> Float[Tensor, "b h"]:
        """Features of the images in the space of both towers, not normalised."""
        return self.each(batch, prompts, self._features)

    def _features(self, batch: Batch, prompt: Prompt) -> Float[Tensor, "b h"]:
        known = self.known(batch, prompt)
        return self._seen(batch, prompt) if known is None else known

    def _seen(self, batch: Batch, prompt: Prompt) -> Float[Tensor, "b h"]:
        with self.seeing(prompt):
            features: Tensor = self.look(self.model.get_image_features, batch.pixels).pooler_output
        return features

    # ---- classes ----------------------------------------------------------------------------------------------------

    def answer_ids(self, words: str, *, glue: str = " ") -> list[int]:
        """Token ids of the words of a class, without special tokens."""
        return self.tower.ids(words)

    def texts(self, prompt: Prompt, candidates: Candidates) -> Float[Tensor, "s c h"]:
        """What the text tower says of each class under the contexts of a prompt; kept where nothing is trained."""
        run = functools.partial(self.tower.features, candidates.ids, candidates.mask, prompt.context, prompt.placement)
        if torch.is_grad_enabled() and prompt.context is not None and prompt.context.requires_grad:
            return run()
        words = tuple(map(tuple, candidates.ids.masked_fill(~candidates.mask, -1).tolist()))
        version = None if prompt.context is None else prompt.context._version
        key = ("texts", words, prompt.placement, id(prompt.context), version, stamp_of(self.model.text_model))
        found = self.kept.get(key, prompt.context)
        if found is None:
            with torch.no_grad():
                found = [(run(),)]
            self.kept.put(key, found, prompt.context)
        return found[0][0]

    def match(self, answer: Float[Tensor, "b h"], vectors: Float[Tensor, "s c h"]) -> Float[Tensor, "b c"]:
        """Cosine of each image with each class, times the model's scale."""
        unit = torch.nn.functional.normalize(answer.float(), dim=-1)
        scores = torch.einsum("bh,sch->bsc", unit, vectors) if len(vectors) == 1 else None
        cosines = scores[:, 0] if scores is not None else torch.einsum("bh,bch->bc", unit, vectors)
        return self.scale * cosines

    @property
    def scale(self) -> Float[Tensor, ""]:
        """What cosines are multiplied by; of a probability by softmax the bias that SigLIP adds has no part."""
        scale: Tensor = self.model.logit_scale.detach().float().exp()
        return scale.reshape(())  # SigLIP has one number in a row

    def score(self, batch: Batch, prompts: Prompts, candidates: Candidates) -> Float[Tensor, "b c"]:
        """Each image against the texts of all classes; answers that do not exist score -inf."""
        return self.each(batch, prompts, functools.partial(self._score, candidates))

    def _score(self, candidates: Candidates, batch: Batch, prompt: Prompt) -> Float[Tensor, "b c"]:
        vectors = torch.nn.functional.normalize(self.texts(prompt, candidates).float(), dim=-1)
        scores = self.match(self._features(batch, prompt), vectors if prompt.by_row else vectors.mean(0, keepdim=True))
        return scores.masked_fill(~candidates.mask.any(-1), -torch.inf)

    def words(self, states: Float[Tensor, "b h"], candidates: Candidates) -> Float[Tensor, "b c"]:
        """The same from features, without any prompt."""
        return self.match(states, torch.nn.functional.normalize(self.texts(Prompt(), candidates).float(), dim=-1))
