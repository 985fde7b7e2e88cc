"""What a backbone is: a frozen model seen as places for a prompt and as something that scores, reads and writes.

Knows no method, task or data set; `inject.py` does the wrapping, and each family says where its model's parts are.
Longer than most files, so that all that a family may rely on or replace stands in one place.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
import transformers
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_serializer, model_validator
from torch import Tensor

from promptuary.backbones import load
from promptuary.backbones.cache import counts_prefix
from promptuary.backbones.feed import reading
from promptuary.backbones.hosts import hold, let_go
from promptuary.backbones.inject import Read
from promptuary.backbones.kept import Kept, bare
from promptuary.backbones.place import Placed, Side, place
from promptuary.backbones.recompute import layers, recomputing
from promptuary.backbones.tail import Tail
from promptuary.backbones.text import AnswerAt, TextCoder
from promptuary.backbones.vocabulary import TableVocabulary, Vocabulary
from promptuary.errors import ConfigError, FingerprintError, SiteError, require
from promptuary.settings import Settings
from promptuary.speakers.base import EndpointConfig, SpeakerConfig
from promptuary.types import ANSWER, Batch, Candidates, Encoded, Piece, Prompt, Shape, Sight

Prompts = Prompt | Sequence[Prompt]
Family = Literal["auto", "causal", "seq2seq", "masked", "encoder", "vision", "dual", "remote"]


class BackboneConfig(Settings):
    """Which frozen model, and how it is held."""

    model: str = Field(
        min_length=1, description="hub name, folder, .gguf file, or pip:PACKAGE/path of a package that carries weights"
    )
    family: str = Field(
        "auto", description="causal, seq2seq, masked, encoder, vision, dual or remote; auto reads the model's config"
    )
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "float32", description="how the frozen weights are held; the prompt stays in float32"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    quantization: Literal["4bit", "8bit"] | None = Field(
        None, description="load with bitsandbytes (NF4 or int8); models that are stored quantised need nothing here"
    )
    pooling: Literal["auto", "mean", "first", "last", "answer", "all"] = Field(
        "auto",
        description="what a head reads: mean of the text (vision: of the patches), first, last or answer token; all: "
        "mean of patches and prompt rows, before the last layer norm (vision; MAE); auto is the family's",
    )
    image_size: int | None = Field(
        None, ge=1, description="side of an image in pixels, other than the model's own; positions are interpolated"
    )
    temperature: float = Field(
        0.05, gt=0, description="of the cosine to class prototypes (encoder); sentence-transformers uses a scale of 20"
    )
    dropout: bool = Field(False, description="run the frozen model's dropout in training; off is faster (our choice)")
    share_prefix: bool = Field(
        True, description="causal models: run what rows begin with in common, such as the prompt, once for all of them"
    )
    narrow_head: bool = Field(
        True,
        description="compute logits only where they are read, for asked words only, and losses in chunks; off: the "
        "model's own pass over every row, position and word, with nothing shared",
    )
    kept_mib: int = Field(
        256, ge=0, description="most memory for keys and values that are kept for later use, in MiB; 0 keeps none"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model; only ever set by hand")
    endpoint: EndpointConfig | None = Field(
        None, description="where a model of the remote family is asked, and what that may cost; for prompts of words"
    )

    @model_validator(mode="after")
    def _asked_somewhere(self) -> BackboneConfig:
        if self.family == "remote" and (self.endpoint is None or self.endpoint.base_url is None):
            raise ValueError("endpoint.base_url: a remote model needs the address of its endpoint")
        if self.family != "remote" and self.endpoint is not None:
            raise ValueError(f'endpoint: only the remote family has one, and the family is "{self.family}"')
        return self

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: Callable[[Any], Any]) -> dict[str, Any]:
        """Of other families the settings are written as they were before there were endpoints."""
        whole: dict[str, Any] = handler(self)
        return whole if self.endpoint is not None else {k: v for k, v in whole.items() if k != "endpoint"}


class Backbone(abc.ABC):
    """A frozen pretrained model with its tokenizer; `thaw` gives up on frozen.

    Facts that a family declares:
        name: family name, file name.
        loader: transformers' class that loads its models.
        answer_at: where an answer goes: at a "mask", at the "end" of the text, as a separate "target", or "none".
        abilities: "words" (score label words), "pool" (one vector per example), "generate".
        pooling: what a head reads by default.
        reads_words: whether its input is a sequence of tokens.
        modality: what an example is: a "text" or an "image".
        sight: how it wants images, of a model that sees.
        differentiable: whether gradients reach a prompt; a model that only scores has none.
    """

    name: ClassVar[str]
    loader: ClassVar[Any]
    answer_at: ClassVar[AnswerAt]
    abilities: ClassVar[frozenset[str]]
    pooling: ClassVar[str]
    sites: ClassVar[frozenset[str]] = frozenset({"input", "offset", "text"})
    words_at_head: bool = True
    differentiable: bool = True
    reads_words: ClassVar[bool] = True
    modality: ClassVar[str] = "text"
    sight: Sight | None = None
    tokenizer: Any
    pad: int
    vocabulary: Vocabulary
    prefix: Sequence[int]
    suffix: Sequence[int]

    def __init__(self, model: Any, reader: Any, config: BackboneConfig) -> None:
        """Freeze and wire a loaded model.

        Args:
            model: a transformers model with input embeddings.
            reader: what prepares its input: a fast tokenizer; of a model that sees, its processor.
            config: how it was loaded; `config.model` is the name that prompts will remember.

        Raises:
            SiteError: the model has no place for a prompt, or the tokenizer is not a fast one.
        """
        self.model, self.config = model, config
        self.read_with(reader)
        # everything that can be refused is refused before the model is touched
        self.check_model()
        self.table = self.input_table()
        # a head for sequences, tokens or spans is the host's own and may be trained: it does not make another base
        headed = self.reads_words and model.get_output_embeddings() is None and model.base_model is not model
        self._identity = load.fingerprint(model.base_model if headed else model, self.table.weight)
        self.wiring, self.released = hold(model, self.pad, words=self.reads_words), False
        self.frozen = True
        if self.wiring.held == 1:
            model.requires_grad_(False)
            model.train(False)
        self.shape = self.find_shape()

    def read_with(self, tokenizer: Any) -> None:
        """Take the tokenizer.

        Raises:
            SiteError: it is not a fast one.
        """
        if not tokenizer.is_fast:
            raise SiteError(
                f"{type(tokenizer).__name__} is not a fast tokenizer; install one that has a tokenizer.json"
            )
        self.tokenizer = tokenizer
        # without a token of its own, padding is the end token, as in transformers: never an ordinary token
        fillers = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad = next(int(token) for token in fillers if token is not None)
        # what the model itself takes for padding; settings of transformers are dear to read, and this is in every step
        own = self.model.config.to_dict().get("pad_token_id")
        self.filler = self.pad if own is None else int(own)
        self.text = TextCoder(tokenizer, self.answer_at)
        self.prefix, self.suffix = self.text.prefix, self.text.suffix

    def input_table(self) -> Any:
        """The module whose weight tells bases apart best: that of the input embedding.

        Raises:
            SiteError: tokens have another one besides.
        """
        if self.model.config.to_dict().get("vocab_size_per_layer_input"):
            raise SiteError(
                f"{type(self.model).__name__} has a second per-token table, where prompts are not proved to work"
            )
        table = self.model.get_input_embeddings()
        self.vocabulary = TableVocabulary(table, self.tokenizer, self.keys_values)
        return table

    def find_shape(self) -> Shape:
        """The widths that a method is built from."""
        width = int(self.vocabulary.embed(torch.tensor([0])).shape[1])
        facts = self._facts()
        # OPT may end in the width of its embeddings
        hidden = facts.get("word_embed_proj_dim") or facts.get("hidden_size") or width
        return Shape(width, *self.key_value_shape(), hidden=hidden, vocabulary=self.wiring.vocabulary)

    def _facts(self) -> dict[str, Any]:
        """The model's config, with what goes by another name there also under the usual one."""
        facts, names = self.model.config.to_dict(), self.model.config.attribute_map
        return facts | {name: facts[own] for name, own in names.items() if facts.get(own)}

    def check_model(self) -> None:  # noqa: B027 (a family without special needs has nothing to add)
        """Refuse a model that lacks what the family needs."""

    def notes(self) -> list[str]:
        """What a user should know of this model before a run."""
        if not self.config.narrow_head or self.model.get_output_embeddings() is None or self.narrow:
            return []
        return [
            f"{type(self.model).__name__} does not let its head run apart: logits of all words are computed everywhere "
            "(backbone.narrow_head: false says that this is meant)"
        ]

    def key_value_shape(self) -> tuple[int, int, int]:
        """Layers, heads and width of a head of the keys and values that a prompt may bring."""
        facts = self._facts()
        heads = facts.get("num_attention_heads") or 1
        width = facts.get("hidden_size") or heads
        layers = facts.get("num_hidden_layers") or 1
        return layers, facts.get("num_key_value_heads") or heads, facts.get("head_dim") or width // heads

    def keys_values(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "1 l 2 k n e"]:
        """Keys and values of a sequence of tokens in the frozen model, float32 on the CPU.

        Raises:
            SiteError: this family has no place for them.
        """
        raise SiteError(self.lacks("kv"))

    @classmethod
    def load(cls, config: BackboneConfig) -> Backbone:
        """Load model and tokenizer as `config` says.

        Raises:
            ConfigError: not found, not readable, or no tokenizer beside it.
        """
        transformers.utils.logging.disable_progress_bar()
        source = load.resolve(config.model)
        options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
        if config.revision is not None:
            options["revision"] = config.revision
        tokenizer = load.from_pretrained(transformers.AutoTokenizer, source, "tokenizer", **options)
        load.check_tokenizer(tokenizer, source)
        options["dtype"] = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        if config.quantization is not None:
            require("bitsandbytes", extra="quantized")
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=config.quantization == "4bit",
                load_in_8bit=config.quantization == "8bit",
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.bfloat16 if config.dtype == "bfloat16" else torch.float32,
            )
            options["device_map"] = {"": pick_device(config.device)}
        model = load.whole_model(cls.loader, source, f"{cls.name} model", **options)
        if config.quantization is None:
            model = model.to(pick_device(config.device))
        load.keep_gradients(model)
        return cls(model, tokenizer, config)

    def release(self) -> Any:
        """Give the model back as it came, unless other prompts still use it."""
        if not self.released:
            self.released = True
            let_go(self.wiring)
        return self.model

    def thaw(self) -> Any:
        """The model, for somebody who trains its own weights: from here on no prompt is taken, and each row runs whole.

        Raises:
            ConfigError: others hold the model too, or it is thawed already.
        """
        if self.wiring.held > 1 or not self.frozen:
            raise ConfigError("weights are trained on a model that nobody else uses; load it once more")
        self.frozen = False
        return self.model

    # ---- what it is -------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the embedding table lies."""
        return self.table.weight.device

    @property
    def max_positions(self) -> int | None:
        """The most positions that the model takes, prompt included; None if it has no such limit."""
        limits = [self.model.config.to_dict().get(key) for key in ("max_position_embeddings", "n_positions")]
        found = [limit for limit in limits if limit]
        if self.tokenizer.model_max_length < 10**6:
            found.append(self.tokenizer.model_max_length)
        return min(found) if found else None

    @property
    def layers(self) -> int:
        """Layers of the model; an encoder-decoder counts both sides."""
        facts = self.model.config.to_dict()
        names = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers")
        first = next((int(facts[name]) for name in names if facts.get(name)), 1)
        more = next((int(facts[name]) for name in ("num_decoder_layers", "decoder_layers") if facts.get(name)), 0)
        return first + more

    @cached_property
    def identity(self) -> dict[str, str]:
        """What tells this base from another: architecture, sampled weights, tokenizer."""
        config = self.model.config
        return {
            "architecture": f"{config.model_type} {self.name} {self.shape.width} {self.wiring.vocabulary}",
            **self._identity,
            "tokenizer": self.reader_hash(),
        }

    def reader_hash(self) -> str:
        """A hash of what prepares the input."""
        return load.tokenizer_hash(self.tokenizer)

    def check_identity(self, expected: dict[str, str], trained_on: str, besides: str = "") -> None:
        """Compare with the identity that a prompt was trained on; `besides` ends the message.

        Raises:
            FingerprintError: says what differs and names both models.
        """
        prepared = {"tokenizer": "preparation of images"} if self.modality == "image" else {}
        differing = [prepared.get(part, part) for part in load.differing(self.identity, expected)]
        if differing:
            raise FingerprintError(
                f'this prompt was trained on "{trained_on}" and does not fit "{self.config.model}": '
                f"{', '.join(differing)} differ{'s' if len(differing) == 1 else ''}; "
                f"load it with the base it was trained on{besides}"
            )

    # ---- text to ids ------------------------------------------------------------------------------------------------

    def answer_ids(self, words: str, *, glue: str = " ") -> list[int]:
        """Token ids of an answer as it stands behind a text, [k]; see `TextCoder`."""
        return self.text.answer_ids(words, glue=glue)

    def encode(self, pieces: Sequence[Piece], max_length: int) -> Encoded:
        """A filled template as token ids with special tokens; see `TextCoder`."""
        return self.text.encode(pieces, max_length)

    # ---- places -----------------------------------------------------------------------------------------------------

    @cached_property
    def mixes_prefixes(self) -> bool:
        """Whether prompts with different numbers of keys and values may stand in one batch."""
        return not counts_prefix(self.model)

    def missing(self, sites: frozenset[str]) -> frozenset[str]:
        """Which of these sites this model does not have."""
        return sites - self.sites

    def lacks(self, *sites: str) -> str:
        """A message that it does not have them."""
        kind, named = f"{type(self.model).__name__} ({self.name})", ", ".join(sorted(sites))
        return f"the prompt uses {named}, for which {kind} has no place; choose another method or model"

    def place(self, batch: Batch, prompts: Prompts, side: Side = "right", **options: Any) -> Placed:
        """Put prompts into a batch; `options` as `place` has them.

        Raises:
            SiteError: a prompt uses a site that this family does not have.
        """
        several = [prompts] if isinstance(prompts, Prompt) else list(prompts)
        for prompt in several:
            missing = self.missing(prompt.sites)
            if missing:
                raise SiteError(self.lacks(*missing))
        first = torch.tensor(self.prefix[:1], dtype=torch.long, device=batch.input_ids.device)
        return place(
            batch,
            several,
            vocabulary=self.wiring.vocabulary,
            pad=self.filler,
            first_ids=first,
            side=side,
            masked=self.answer_at == "mask",
            **options,
        )

    @contextmanager
    def running(self, placed: Placed, read: Read | None = None) -> Iterator[dict[str, Tensor]]:
        """The arguments of the model's forward pass while the placed prompts are active."""
        inputs = reading(self.model, placed)
        with self.wiring.active(placed.bank, read, placed.attention_mask):
            yield inputs

    def arguments(self, ids: Int[Tensor, "b n"]) -> dict[str, Any]:
        """What the model's forward pass takes so that it expects something behind each of these ids."""
        return {"input_ids": ids}

    @cached_property
    def tail(self) -> Tail:
        """The model behind its body."""
        return Tail(self.wiring, self.arguments, words_at_head=self.words_at_head)

    @property
    def narrow(self) -> bool:
        """Whether only what is read is computed: as the settings ask, where it was tried and found exact."""
        return self.config.narrow_head and self.separable

    @property
    def separable(self) -> bool:
        """Whether the head can run apart from the body: it is tried once."""
        return self.tail.exact(self.arguments(self.vocabulary.common(6)[None].to(self.device)))

    @cached_property
    def kept(self) -> Kept:
        """What is computed once and kept, within the bound of the settings."""
        return Kept(self.config.kept_mib * 2**20)

    def ask_through(self, opened: Callable[[SpeakerConfig, str], Any]) -> None:  # noqa: B027
        """Of a model behind an endpoint: ask through what this opens for a role; others run here and ask nobody."""

    @contextmanager
    def dropping(self) -> Iterator[None]:
        """The model's dropout at work inside, if the settings ask for it; it is off everywhere else."""
        if not self.config.dropout:
            yield
            return
        if self.model.get_output_embeddings() is not None:
            self.narrow  # noqa: B018 (is tried while nothing is drawn)
        self.model.train(True)
        try:
            yield
        finally:
            self.model.train(False)

    def recomputing(self, wanted: bool = True) -> contextlib.AbstractContextManager[None]:
        """Inside, layers keep their inputs only, and run again in the backward pass.

        Raises:
            SiteError: the model has no layers that can run again.
        """
        return recomputing(self.wiring) if wanted else contextlib.nullcontext()

    @property
    def recomputes(self) -> bool:
        """Whether the model has layers that can run again."""
        return bool(layers(self.model))

    def embeddings(self, batch: Batch) -> Float[Tensor, "b t d"]:
        """Frozen embeddings of the text, for methods that need them."""
        with torch.no_grad():
            return self.table(batch.input_ids)

    def content(self, batch: Batch) -> Bool[Tensor, "b t"]:
        """Which tokens are text: real, no special token, no answer."""
        special = torch.tensor(self.tokenizer.all_special_ids, device=batch.input_ids.device)
        found = batch.attention_mask.bool() & ~torch.isin(batch.input_ids, special)
        return found if batch.plain is None else found & ~batch.plain

    def bare(self, batch: Batch, what: Literal["states", "answer"]) -> Tensor:
        """What the frozen model says of the text without any prompt; each text runs once and is kept.

        Returns:
            "states": last hidden states at the text's tokens, zero at padding, [b, t, h]; "answer": the state that the
            answer is read from, [b, h].
        """
        read = self.hidden if what == "states" else self.answer
        return bare(lambda rows: read(replace(rows, prompt_index=None), Prompt()), batch, what, self.model, self.kept)

    def probe(self) -> Batch:
        """A text of one usual token with its answer there, to look at what does not depend on the text."""
        first = self.vocabulary.common(1).to(self.device)
        nothing = torch.zeros_like(first)
        return Batch(first[None], torch.ones_like(first)[None], nothing, slots={ANSWER: nothing})

    @property
    def uses_segments(self) -> bool:
        """Whether the model tells first and second text apart."""
        return "token_type_ids" in self.tokenizer.model_input_names

    # ---- what it does -----------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def hidden(self, batch: Batch, prompts: Prompts) -> Float[Tensor, "b t h"]:
        """Last hidden states at the text tokens; no prompt positions, no output head."""

    def pooled(self, batch: Batch, prompts: Prompts) -> Float[Tensor, "b h"]:
        """One vector per example, from text tokens only (never from prompt rows)."""
        return self.pool(batch, self.hidden(batch, prompts))

    def pool(self, batch: Batch, states: Float[Tensor, "b t h"]) -> Float[Tensor, "b h"]:
        """The same from last hidden states that are there already."""
        mask = batch.attention_mask.bool()
        how = self.pooling if self.config.pooling == "auto" else self.config.pooling
        if how == "mean":
            weight = mask.float()[..., None]  # a mean of short numbers is taken in float32
            return (states * weight).sum(1) / weight.sum(1).clamp(min=1)
        ends = {"first": mask.long().argmax(1), "last": (mask.long().cumsum(1) * mask).argmax(1)}
        if how == "answer" and ANSWER not in batch.slots:
            raise ConfigError('backbone.pooling is "answer" but the template has no {mask}; add it or pool otherwise')
        at = batch.slots[ANSWER] if how == "answer" else ends[how]
        return states[torch.arange(len(batch), device=at.device), at]

    def answer(self, batch: Batch, prompts: Prompts) -> Float[Tensor, "b h"]:
        """The state that an answer of one token is read from.

        Raises:
            DataError: the text has no place for an answer.
        """
        return self.pooled(batch, prompts)

    def answer_in(self, batch: Batch, states: Float[Tensor, "b t h"]) -> Float[Tensor, "b h"] | None:
        """The same out of the last hidden states of a text without a prompt; None where it is read elsewhere."""
        return self.pool(batch, states)

    def words(self, states: Float[Tensor, "b h"], candidates: Candidates) -> Float[Tensor, "b c"]:
        """Scores of answers of one token from such states: `score` is this, asked of `answer`.

        Raises:
            SiteError: an answer has several tokens, or the model's head does not run apart from its body.
        """
        if int(candidates.mask.sum(-1).max()) > 1:
            raise SiteError("answers of several tokens are not read from one state; choose label words of one token")
        if not self.separable:
            raise SiteError(f"{type(self.model).__name__} does not let its head run apart from its body")
        ids = candidates.ids[..., 0].clamp(min=0)
        words = torch.unique(ids)
        logits = self.tail.logits(states.to(self.model.dtype), words).float()
        found = read_words(logits, words, ids.expand(len(states), -1))
        return found.masked_fill(~candidates.mask.any(-1), -torch.inf)

    def score(self, batch: Batch, prompts: Prompts, candidates: Candidates) -> Float[Tensor, "b c"]:
        """A score per possible answer; softmax over them gives their probabilities among themselves.

        One-token answers: their logits at the answer position, and nothing else is computed. Longer answers:
        mean log-probability per token under the full vocabulary. Answers that do not exist for a row score -inf.

        Raises:
            SiteError: this family does not score words.
        """
        exists = candidates.mask.any(-1)
        if int(candidates.mask.sum(-1).max()) == 1:
            scores = self.score_words(batch, prompts, candidates.ids[..., 0])
        else:
            scores = self.score_phrases(batch, prompts, candidates)
        return scores.masked_fill(~exists, -torch.inf)

    def score_words(self, batch: Batch, prompts: Prompts, ids: Tensor) -> Float[Tensor, "b c"]:
        """Scores of one-token answers, `ids` [c] or [b, c]."""
        raise SiteError(f"the {self.name} family does not score words; use task.reading: head")

    def score_phrases(self, batch: Batch, prompts: Prompts, candidates: Candidates) -> Float[Tensor, "b c"]:
        """Scores of answers of several tokens."""
        raise SiteError(f"the {self.name} family does not score words; use task.reading: head")

    def texts(self, prompt: Prompt, candidates: Candidates) -> Float[Tensor, "s c h"]:
        """What a text tower says of each class under the contexts of a prompt, not normalised.

        Raises:
            SiteError: this family has no text tower.
        """
        raise SiteError(self.lacks("context"))

    def match(self, answer: Float[Tensor, "b h"], vectors: Float[Tensor, "s c h"]) -> Float[Tensor, "b c"]:
        """Scores of images against class vectors, one matrix of them for all images or one for each.

        Raises:
            SiteError: this family has no text tower.
        """
        raise SiteError(self.lacks("context"))

    @property
    def scale(self) -> Float[Tensor, ""]:
        """What a cosine of image and class is multiplied by.

        Raises:
            SiteError: this family has no text tower.
        """
        raise SiteError(self.lacks("context"))

    def tokens(self, batch: Batch, *, position: bool) -> list[Float[Tensor, "b n v"]]:
        """The patch tokens that enter each layer.

        Raises:
            SiteError: this family sees nothing.
        """
        raise SiteError(self.lacks("layers"))

    def norm_values(self) -> Float[Tensor, "n 2 v"] | None:
        """Weights and biases of the layer norms in the blocks of a model that sees, float32 on the CPU; else None."""
        return None

    def answer_losses(self, batch: Batch, prompts: Prompts) -> Float[Tensor, " b"]:
        """Negative log-probability of `batch.target_ids` of each row; the head runs on their positions only."""
        raise SiteError(f"the {self.name} family does not write text; use a causal or seq2seq model")

    def generate(self, batch: Batch, prompts: Prompts, *, max_new_tokens: int, **options: Any) -> list[list[int]]:
        """Ids of the written answers, without prompt, text and padding. Greedy unless `options` say otherwise."""
        raise SiteError(f"the {self.name} family does not write text; use a causal or seq2seq model")


def pick_device(name: str) -> torch.device:
    """A device by name; "auto" takes CUDA, then Apple's, then the CPU.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(" device type at start")[0]
        raise ConfigError(
            f'backbone.device: "{name}" is not available here ({reason}); use cpu, or auto for the best there is'
        ) from None
    if device.type == "meta":
        raise ConfigError('backbone.device: "meta" holds no numbers; use cpu, or auto for the best there is')
    return device


def read_words(logits: Float[Tensor, "b w"], words: Tensor, ids: Tensor) -> Float[Tensor, "b c"]:
    """Pick each row's own words out of logits over the sorted `words`."""
    return logits.gather(1, torch.searchsorted(words, ids.contiguous()))


def phrase_scores(taken: Float[Tensor, "n k"], mask: Tensor) -> Float[Tensor, " n"]:
    """Mean log-probability per real token, [n]; a phrase without tokens gets 0."""
    return (taken * mask).sum(-1) / mask.sum(-1).clamp(min=1)
