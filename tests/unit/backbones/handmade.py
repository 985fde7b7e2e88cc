"""Batches from texts, and the same models run by hand on concatenated `inputs_embeds`, as references.

Knows no test; nothing here uses virtual ids.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import tiny
from promptuary.backbones.base import Backbone
from promptuary.data.collate import Row, collate, pad_candidates
from promptuary.types import ANSWER, Batch, Candidates, Offset, Piece, Prompt

KINDS = list(tiny.FAMILY)
WORDY = [kind for kind in KINDS if tiny.FAMILY[kind] != "encoder"]
CAUSAL = [kind for kind in KINDS if tiny.FAMILY[kind] == "causal"]
SEQ2SEQ = [kind for kind in KINDS if tiny.FAMILY[kind] == "seq2seq"]
WRITERS = CAUSAL + SEQ2SEQ
MASKED = [kind for kind in KINDS if tiny.FAMILY[kind] == "masked"]
TEXTS = ["the sky is blue and the sea is not green", "a cat", "it was a very good review"]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def pieces(text: str) -> list[Piece]:
    """TEXT it was {mask}."""
    return [Piece("field", text), Piece("fixed", " it was "), Piece("slot", ANSWER)]


def batch(backbone: Backbone, filled: list[list[Piece]], **targets: Any) -> Batch:
    """Filled templates as a right-padded batch."""
    rows = [Row(backbone.encode(parts, 64), index) for index, parts in enumerate(filled)]
    return replace(collate(rows, backbone.pad, segments=backbone.uses_segments), **targets)


def texts(backbone: Backbone, which: list[str] | None = None) -> Batch:
    """The usual texts with the usual template."""
    return batch(backbone, [pieces(text) for text in (TEXTS if which is None else which)])


def left(given: Batch) -> Batch:
    """The same batch with its padding on the left."""
    shift = given.input_ids.shape[1] - given.attention_mask.sum(1)

    def roll(value: Tensor) -> Tensor:
        return torch.stack([row.roll(int(by)) for row, by in zip(value, shift, strict=True)])

    segments = None if given.segment_ids is None else roll(given.segment_ids)
    return replace(
        given,
        input_ids=roll(given.input_ids),
        attention_mask=roll(given.attention_mask),
        segment_ids=segments,
        slots={name: at + shift for name, at in given.slots.items()},
    )


def one(given: Batch, row: int) -> Batch:
    """One row of a batch without any padding."""
    alone = given.rows(torch.tensor([row]))
    length = int(alone.attention_mask.sum())
    return replace(alone, input_ids=alone.input_ids[:, :length], attention_mask=alone.attention_mask[:, :length])


def candidates(backbone: Backbone, *answers: str) -> Candidates:
    """The same answers for every row."""
    return pad_candidates([backbone.answer_ids(answer) for answer in answers or ("good", "bad", "red")])


def rows(count: int, seed: int = 1, many: int = 1) -> Tensor:
    """Prompt rows that can be trained, [many, count, d]."""
    made = torch.randn(many, count, tiny.WIDTH, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_()


def offset(length: int = 32, seed: int = 2, **settings: Any) -> Offset:
    """A low-rank table of rank 2 that can be trained."""
    source = torch.Generator().manual_seed(seed)
    left_part, right_part = torch.randn(length, 2, generator=source), torch.randn(2, tiny.WIDTH, generator=source)
    return Offset(left_part.requires_grad_(), right_part.requires_grad_(), **settings)


def llama_config(**settings: Any) -> Any:
    """The configuration of the tiny Llama with other settings."""
    usual = tiny.model("llama").config.to_dict()
    return type(tiny.model("llama").config)(**{**usual, "head_dim": None, **settings})


PROMPTS = {
    "rows": lambda: Prompt(rows(3)),
    "offset": lambda: Prompt(offset=offset()),
    "both": lambda: Prompt(rows(3), offset()),
}


def tokens(given: Batch, row: int) -> list[int]:
    """The real ids of a row."""
    return given.input_ids[row][given.attention_mask[row].bool()].tolist()


def embed(raw: Any, sequence: list[int | Tensor]) -> Tensor:
    """Ids through the model's own table and vectors as they are, in their order, [1, q, d]."""
    table = raw.get_input_embeddings()
    parts = [table(torch.tensor([item]))[0] if isinstance(item, int) else item for item in sequence]
    return torch.stack(parts)[None]


def prompted(raw: Any, ids: list[int], prompt: Prompt, plain: int = 0) -> Tensor:
    """Rows in front of embeddings that got their table rows by position; the last `plain` tokens get none."""
    sequence: list[int | Tensor] = list(ids)
    embedded = embed(raw, sequence)[0]
    if prompt.offset is not None:
        table, last = prompt.offset.table(), len(ids) - plain
        embedded = torch.cat([embedded[:last] + table[:last], embedded[last:]])
    if prompt.rows is not None:
        embedded = torch.cat([prompt.rows[0], embedded])
    return embedded[None]


def states(raw: Any, kind: str, embedded: Tensor) -> Tensor:
    """Last hidden states of the encoder or decoder-only model."""
    run = {"seq2seq": lambda: raw.get_encoder(), "encoder": lambda: raw}.get(
        tiny.FAMILY[kind], lambda: raw.base_model
    )()
    return run(inputs_embeds=embedded).last_hidden_state


def logits(raw: Any, kind: str, embedded: Tensor, answer: list[int], start: list[int]) -> Tensor:
    """Logits that predict each token of an answer behind a text, [k, V]: the plain model, the whole vocabulary."""
    if tiny.FAMILY[kind] == "seq2seq":
        decoder = torch.tensor([[*start, *answer[:-1]]])
        return raw(inputs_embeds=embedded, decoder_input_ids=decoder).logits[0, len(start) - 1 :]
    behind = [embedded] if len(answer) == 1 else [embedded, embed(raw, list(answer[:-1]))]
    return raw(inputs_embeds=torch.cat(behind, dim=1)).logits[0, embedded.shape[1] - 1 :]


def start_of(backbone: Backbone) -> list[int]:
    """What the decoder is given before an answer."""
    return list(getattr(backbone, "decoder_start", []))
