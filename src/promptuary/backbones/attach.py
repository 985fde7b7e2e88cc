"""Prompts on the host's own model: its `forward` and `generate` take and give text positions only.

Knows no method and no task: an attachment gives a prompt for a batch. Every argument of transformers is either made
right with a prompt or refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from promptuary.backbones.cache import window_of
from promptuary.backbones.feed import decoder_writing, decoding, reading, writing
from promptuary.backbones.inject import Read, Wiring
from promptuary.backbones.place import Placed, Side
from promptuary.backbones.translate import (
    TextStreamer,
    check_positions,
    finish_spans,
    lengthen,
    refuse,
    start_again,
    strip,
    turns_of,
    without,
)
from promptuary.errors import ConfigError, SiteError
from promptuary.types import IGNORED, Batch

Placer = Callable[[Batch, Side, Tensor | None], Placed]

WHOLE = ("ForSequenceClassification", "ForMultipleChoice")
"""Endings of models whose labels belong to a whole text, not to its tokens."""


@dataclass(eq=False)
class Attachment:
    """One or several prompts on a model.

    `placer` puts them into a batch; `names` are what rows call them by, empty for a single one; `decodes`: whether
    logits come from a decoder, which has no prompt positions; `causal`: whether text continues, so that caches can be
    handed on; `fixed`: whether the prompt is the same for every text.
    """

    placer: Placer
    names: Sequence[str]
    decodes: bool
    causal: bool
    fixed: bool
    wiring: Wiring

    # ---- forward ----------------------------------------------------------------------------------------------------

    def forward(self, run: Callable[..., Any], given: dict[str, Any]) -> Any:
        """The model's forward pass on text positions."""
        refuse(given)
        as_tuple = given.pop("return_dict", None) is False
        output = self._forward(run, {**given, "return_dict": True})
        return output.to_tuple() if as_tuple else output

    def _forward(self, run: Callable[..., Any], given: dict[str, Any]) -> Any:
        names, mask = given.pop("prompt_names", None), given.pop("attention_mask", None)
        ids, vectors = given.pop("input_ids", None), given.pop("inputs_embeds", None)
        if given.get("encoder_outputs") is not None:
            return run(input_ids=ids, attention_mask=self._encoded_mask(mask, given, names), **given)
        if (ids is None) == (vectors is None):
            raise SiteError("with a prompt attached, forward takes either input_ids or inputs_embeds")
        choices = None
        if ids is not None and ids.dim() == 3:  # several texts to choose among
            choices, ids = ids.shape[1], ids.flatten(0, 1)
            mask = None if mask is None else mask.flatten(0, 1)
            given = {k: v.flatten(0, 1) if k == "token_type_ids" and v is not None else v for k, v in given.items()}
        shape = ids.shape if ids is not None else vectors.shape[:2]
        device = ids.device if ids is not None else vectors.device
        cache = given.get("past_key_values") if self.causal else None
        seen = 0 if cache is None else int(cache.get_seq_length())
        positions = given.pop("position_ids", None)
        if positions is not None and not seen:
            positions = positions.expand(shape)
            if start_again(positions, mask):
                return self._packed(run, ids, vectors, positions, names, given)
        if mask is not None and mask.dim() != 2:
            raise SiteError(f"with a prompt attached, attention_mask is [batch, tokens], not {tuple(mask.shape)}")

        if seen:
            placed, text = self._continued(ids, vectors, mask, cache, names, shape)
            columns = torch.arange(shape[1], device=device).expand(shape)
        else:
            text = torch.ones(shape, dtype=torch.long, device=device) if mask is None else mask.long()
            batch = self._batch(ids, text, names, given.pop("token_type_ids", None))
            # placing is bookkeeping on ids: a compiler has nothing to win there
            place = torch.compiler.disable(self.placer) if torch.compiler.is_compiling() else self.placer
            placed = place(batch, "keep" if self.causal else "right", vectors)
            columns = placed.columns
        if positions is not None:
            check_positions(positions, text, shape[1])
        arguments = reading(
            self.wiring.model, placed, cache=cache, counting=self.causal, new=shape[1] if seen else None
        )
        if placed.prefix is not None:
            if self.causal:
                self._check_gap(placed)
            given = self._with_prefix(given, placed, arguments)
        width = arguments["input_ids"].shape[1]
        if choices is not None:
            arguments = {k: v.view(-1, choices, v.shape[-1]) for k, v in arguments.items()}

        kept = given.pop("logits_to_keep", None)
        read = self._read(columns, kept, given)
        spans: dict[str, Tensor] = {n: given.pop(n) for n in ("start_positions", "end_positions") if n in given}
        labels = given.get("labels")
        if labels is not None and self._per_token(labels, shape):
            moved = labels.new_full((shape[0], width), IGNORED)
            # padding counts nothing, so a label on it cannot either; and as without a prompt, the first token of a text
            # is not predicted, so that losses can be compared and Trainer's count of items is right
            counts = text.bool() & (text.cumsum(1) > int(self.causal))
            rows, at = ((labels != IGNORED) & counts[:, -shape[1] :]).nonzero(as_tuple=True)
            given["labels"] = moved.index_put((rows, columns[rows, at]), labels[rows, at])
        with self.wiring.active(placed.bank, read, placed.attention_mask):
            output = run(**arguments, **given)
        kept = output.get("past_key_values")
        if mask is not None and not seen and kept is not None and not bool(text.any(1).all()):
            turns_of(kept).broken = "a row of its first part held padding only, no text"
        if not self.decodes:
            strip(output, columns, width, read is not None)
        return finish_spans(output, text[:, -shape[1] :], spans)

    def _batch(self, ids: Tensor | None, mask: Tensor, names: Any, segments: Tensor | None = None) -> Batch:
        """Text as the rest of the library knows it."""
        which = None
        if self.names:
            unknown = [name for name in names or [None] if name not in self.names]
            if unknown or len(names) != len(mask):
                raise ConfigError(
                    f"prompt_names needs one of {', '.join(self.names)} for each of the {len(mask)} rows, got {names}"
                )
            which = torch.tensor([self.names.index(name) for name in names], device=mask.device)
        elif names is not None:
            raise ConfigError("prompt_names is for several prompts: attach({name: prompt, ...}, model)")
        ids = torch.zeros_like(mask) if ids is None else ids
        index = torch.arange(len(mask), device=mask.device)
        return Batch(ids, mask, index, segment_ids=segments, prompt_index=which)

    def _with_prefix(self, given: dict[str, Any], placed: Placed, arguments: dict[str, Any]) -> dict[str, Any]:
        """The host's arguments without those that carry the prefix: the decoder's, or the cache that was filled."""
        if not self.decodes:
            return {k: v for k, v in given.items() if k != "past_key_values" or k not in arguments}
        cache, ids = given.get("past_key_values"), given.get("decoder_input_ids")
        ids = given.get("labels") if ids is None else ids
        if ids is None:
            raise SiteError("a prompt of keys and values in the decoder needs decoder_input_ids or labels")
        mask = given.get("decoder_attention_mask")
        assert placed.prefix is not None
        if cache is not None and cache.get_seq_length():
            seen = int(cache.get_seq_length()) - placed.prefix.length
            mask = ids.new_ones(len(ids), seen + ids.shape[1]) if mask is None else mask
            return {**given, "decoder_attention_mask": torch.cat([placed.prefix.mask, mask], dim=1)}
        return {**given, **decoding(self.wiring.model, placed.prefix, ids, mask)}

    def _continued(
        self, ids: Tensor | None, vectors: Tensor | None, mask: Tensor | None, cache: Any, names: Any, shape: Any
    ) -> tuple[Placed, Tensor]:
        """New text behind a cache that holds the prompt and earlier text: the layout follows from the whole mask."""
        if vectors is not None:
            raise SiteError("with a prompt attached, inputs_embeds cannot continue a cache; pass input_ids")
        if not self.fixed:
            raise SiteError("a prompt that depends on the text cannot continue a cache; run the whole text again")
        assert ids is not None
        turns_of(cache).check()
        seen = int(cache.get_seq_length())
        nothing = self._batch(None, torch.ones_like(ids), names)
        empty = self.placer(nothing, "keep", None)
        _check_turn(empty)
        added = empty.input_ids.shape[1] - shape[1] + (empty.prefix.length if empty.prefix is not None else 0)
        before = seen - added
        if before < 0:
            raise SiteError(f"past_key_values holds {seen} positions, fewer than the {added} of the prompt")
        if mask is None:
            mask = ids.new_ones(shape[0], before + shape[1])
        if mask.shape[1] != before + shape[1]:
            raise SiteError(
                f"attention_mask has {mask.shape[1]} columns, but {before} tokens of text are in past_key_values and "
                f"{shape[1]} are new; it counts text only, never the prompt"
            )
        whole = torch.cat([ids.new_zeros(shape[0], before), ids], dim=1)
        batch = turns_of(cache).without_offset(self._batch(whole, mask.long(), names))
        return self.placer(batch, "keep", None), mask.long()

    def _packed(
        self, run: Callable[..., Any], ids: Any, vectors: Any, positions: Tensor, names: Any, given: dict[str, Any]
    ) -> Any:
        """Several texts in a row, told apart by positions that start again: each takes the prompt and sees only itself.

        They run as rows of their own, so that this holds for every model.
        """
        if given.get("past_key_values") is not None or given.pop("logits_to_keep", None):
            raise SiteError("packed texts (position_ids that start again) take no past_key_values and logits_to_keep")
        starts = positions == 0
        starts[:, 0] = True
        rows, begin = starts.nonzero(as_tuple=True)
        ends = torch.cat([begin[1:], begin.new_tensor([positions.shape[1]])])
        ends = torch.where(ends <= begin, ends.new_full((), positions.shape[1]), ends)
        lengths = ends - begin
        column = torch.arange(int(lengths.max()), device=positions.device)
        mask = column < lengths[:, None]
        at = (begin[:, None] + column).clamp(max=positions.shape[1] - 1)

        def unpack(value: Any, filling: int) -> Any:
            if not isinstance(value, Tensor) or value.shape[:2] != positions.shape:
                return value
            picked = value[rows[:, None], at]
            return picked.masked_fill(~mask.view(*mask.shape, *[1] * (picked.dim() - 2)), filling)

        if names is not None:
            names = [names[row] for row in rows.tolist()]
        given = {name: unpack(value, IGNORED if name == "labels" else 0) for name, value in given.items()}
        apart = {"input_ids": unpack(ids, 0), "inputs_embeds": unpack(vectors, 0), "attention_mask": mask.long()}
        output = self._forward(run, {**given, **apart, "prompt_names": names, "use_cache": False})
        for name in ("logits", "last_hidden_state"):
            if output.get(name) is not None:
                packed = output[name].new_zeros(*positions.shape, output[name].shape[-1])
                output[name] = packed.index_put((rows[:, None].expand_as(at)[mask], at[mask]), output[name][mask])
        return output

    def _encoded_mask(self, mask: Tensor | None, given: dict[str, Any], names: Any) -> Tensor | None:
        """The mask over an encoder's states that hold the prompt, from the mask over the text."""
        states = given["encoder_outputs"][0]
        if mask is None or mask.shape[1] == states.shape[1]:
            return mask
        return self.placer(self._batch(None, mask, names), "right", None).attention_mask

    def _read(self, columns: Tensor, kept: Any, given: dict[str, Any]) -> Read | None:
        """`logits_to_keep` counts text columns."""
        if kept is None or (isinstance(kept, int) and kept == 0):
            return None
        if given.get("labels") is not None:
            raise SiteError("logits_to_keep and labels do not go together")
        if self.decodes or self.wiring.model.get_output_embeddings() is None:
            raise SiteError(f"{type(self.wiring.model).__name__} takes no logits_to_keep with a prompt attached")
        return Read(columns[:, -kept:] if isinstance(kept, int) else columns[:, kept])

    def _per_token(self, labels: Tensor, shape: Any) -> bool:
        """Whether labels stand at tokens of the text, and so move with them."""
        return (
            not self.decodes
            and not type(self.wiring.model).__name__.endswith(WHOLE)
            and tuple(labels.shape) == tuple(shape)
        )

    # ---- generate ---------------------------------------------------------------------------------------------------

    def _check_gap(self, placed: Placed) -> None:
        """Padding between a prefix and its text would push it out of a sliding window."""
        if window_of(self.wiring.model) is not None and not bool(placed.attention_mask[:, 0].all()):
            raise SiteError(
                "in a model with a sliding window, padding on the left would stand between a prompt of keys and "
                "values and its text; pad on the right, or write for texts of one length at a time"
            )

    def _writing(self, placed: Placed, given: dict[str, Any], seen: int) -> tuple[dict[str, Any], int]:
        """Arguments for `generate`, and how many columns of the decoder's sequences nobody asked for."""
        model = self.wiring.model
        if placed.prefix is None or (self.causal and seen):
            arguments: dict[str, Any] = {"input_ids": placed.input_ids, "attention_mask": placed.attention_mask}
            if placed.prefix is not None:
                arguments = {
                    "input_ids": torch.cat([torch.full_like(placed.prefix.mask, placed.pad), placed.input_ids], dim=1),
                    "attention_mask": torch.cat([placed.prefix.mask, placed.attention_mask], dim=1),
                }
            return arguments, 0
        if self.causal:
            self._check_gap(placed)
            return writing(model, placed, {**given, "past_key_values": None}), 0
        start = given.pop("decoder_input_ids", None)
        if start is None:
            config = given.get("generation_config") or model.generation_config
            first = config.decoder_start_token_id
            start = placed.input_ids.new_full(
                (len(placed.input_ids), 1), config.bos_token_id if first is None else first
            )
        return decoder_writing(model, placed, start, given)

    def generate(self, write: Callable[..., Any], given: dict[str, Any]) -> Any:
        """The model's own `generate`; sequences hold the text as it was given, then what was written."""
        refuse(given)
        names, mask = given.pop("prompt_names", None), given.pop("attention_mask", None)
        ids, vectors = given.pop("input_ids", None), given.pop("inputs_embeds", None)
        inputs = given.pop("inputs", None)
        ids = inputs if ids is None else ids
        if (ids is None) == (vectors is None):
            raise SiteError("with a prompt attached, generate takes either input_ids or inputs_embeds")
        shape = ids.shape if ids is not None else vectors.shape[:2]
        device = ids.device if ids is not None else vectors.device
        mask = torch.ones(shape, dtype=torch.long, device=device) if mask is None else mask.long()
        cache = given.get("past_key_values") if self.causal else None
        seen = 0 if cache is None else int(cache.get_seq_length())
        if given.pop("position_ids", None) is not None:
            raise SiteError("with a prompt attached, generate counts positions itself: leave position_ids out")
        if seen:
            turns_of(cache).check()
        if seen and not self.fixed:
            raise SiteError("a prompt that depends on the text cannot continue a cache; run the whole text again")
        side: Side = "right" if not self.causal else "keep" if seen else "left"
        batch = self._batch(ids, mask, names)
        placed = self.placer(turns_of(cache).without_offset(batch) if seen else batch, side, vectors)
        if seen:
            _check_turn(placed)
        arguments, hidden = self._writing(placed, given, seen)
        longer = arguments["input_ids"].shape[1] - shape[1] if self.causal else hidden
        if longer:
            lengthen(given, longer)
        streamer = given.get("streamer")
        if streamer is not None and not self.decodes:
            given["streamer"] = TextStreamer(streamer, ids)
        with self.wiring.active(placed.bank, None, placed.text_mask if self.causal else placed.attention_mask):
            output = write(**given, **arguments)
        if self.decodes:
            return without(output, hidden)
        written = output if isinstance(output, Tensor) else output.sequences
        clean = written[:, arguments["input_ids"].shape[1] :]
        new = clean.shape[1]
        if ids is not None:
            clean = torch.cat([ids.repeat_interleave(len(written) // len(ids), 0), clean], dim=1)
        kept = cache if isinstance(output, Tensor) else output.get("past_key_values")
        if kept is not None:
            turns = turns_of(kept)
            turns.written.append((shape[1], shape[1] + new))
            if not seen and bool((mask.diff(dim=1) < 0).any()):
                turns.broken = "it was filled from right-padded text; pad on the left"
        if isinstance(output, Tensor):
            return clean
        output.sequences = clean
        return output


def _check_turn(placed: Placed) -> None:
    """Refuse prompts whose place moves as the text goes on."""
    if any(prompt.placement == "end" for prompt in placed.prompts):
        raise SiteError("a prompt behind the text stands elsewhere in a longer text; run the whole text again")
