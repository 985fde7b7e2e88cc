"""Text towers: features of classes equal what the model itself gives for the same words and vectors, done by hand.

Knows no method or task. By hand, the rows of a context are words of the model's own vocabulary, behind the others.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from promptuary.backbones.layout import arranged, sides
from promptuary.backbones.tower import Tower, tower_of
from promptuary.errors import ConfigError
from promptuary.testing import tiny, tiny_pairs
from promptuary.types import Placement

NAMES = ["cat", "old dog", "red green bird . one two", "sea", "very small fish"]
ROWS = 4
MIDDLE: Placement = (("before_answer", 3), ("after_answer", 1))
KINDS = ("clip", "siglip", "pair")
LONGEST = {"clip": 77, "siglip": 64, "pair": 80}

every = pytest.mark.parametrize("kind", KINDS)
places = pytest.mark.parametrize("placement", ["front", MIDDLE, "end"], ids=["front", "middle", "end"])
contexts = pytest.mark.parametrize(
    ("sets", "each", "deep"), [(1, 1, 1), (3, 1, 1), (1, 5, 1), (2, 5, 2), (2, 1, 2)], ids=lambda number: str(number)
)


def tower(kind: str, **settings: bool) -> Tower:
    return tower_of(tiny_pairs.model(kind).requires_grad_(False), tiny_pairs.tokenizer(kind), **settings)


def words(made: Tower, names: list[str]) -> tuple[Tensor, Tensor]:
    ids = [made.ids(name) for name in names]
    width = max(len(one) for one in ids)
    padded = torch.tensor([one + [0] * (width - len(one)) for one in ids])
    return padded, torch.arange(width) < torch.tensor([[len(one)] for one in ids])


def vectors(sets: int, each: int, deep: int, rows: int = ROWS) -> Tensor:
    """A context [s, n, l, m, d] of the size of the tiny models' token embeddings."""
    drawn = torch.randn(sets, each, deep, rows, tiny_pairs.WIDTH, generator=torch.Generator().manual_seed(1))
    return (drawn * 0.1).requires_grad_()


def by_hand(kind: str, names: list[str], context: Tensor, placement: Placement) -> Tensor:
    """Each class alone, padded to the model's longest, by the model's own `get_text_features`."""
    sets, each, deep, rows, _ = context.shape
    tokenizer, out = tiny_pairs.tokenizer(kind), []
    for number in range(sets * len(names)):
        which, name = divmod(number, len(names))
        model = tiny_pairs.model(kind).requires_grad_(False)
        mine = context[which, name if each > 1 else 0]
        table = model.text_model.get_input_embeddings()
        vocabulary, known = len(table.weight), table.weight
        del table.weight
        table.weight = torch.cat([known, mine[0]])
        full = tokenizer(names[name]).input_ids
        at = full.index(tokenizer(names[name], add_special_tokens=False).input_ids[0])
        before, after = {"front": (rows, 0), "end": (0, rows)}.get(placement, (3, 1))
        added = list(range(vocabulary, vocabulary + rows))
        ids = [*full[:at], *added[:before], *full[at:-1], *added[before:], full[-1]]
        assert before + after == rows
        where = [ids.index(row) for row in added]
        mask = [1] * len(ids) + [0] * (LONGEST[kind] - len(ids))
        ids += [0] * (LONGEST[kind] - len(ids))
        if kind == "clip":  # its own end token is the highest id
            model.text_model.eos_token_id = full[-1]
        layers = model.text_model.encoder.layer if kind == "pair" else model.text_model.encoder.layers
        for layer in range(1, deep):
            layers[layer].register_forward_pre_hook(Replaced(where, mine[layer]), with_kwargs=True)
        given: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if kind != "siglip":
            given["attention_mask"] = torch.tensor([mask])
        out.append(model.get_text_features(**given).pooler_output[0])
    return torch.stack(out).unflatten(0, (sets, len(names)))


class Replaced:
    """What becomes of the rows is replaced before a layer."""

    def __init__(self, where: list[int], rows: Tensor) -> None:
        self.where, self.rows = where, rows

    def __call__(self, layer: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        states = given[0].clone()
        states[0, self.where] = self.rows
        return (states, *given[1:]), named


def value_and_gradient(features: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    wanted = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    return features.detach(), torch.autograd.grad((features * wanted).sum(), context)[0]


def same(one: Tensor, other: Tensor, within: float = 1e-5) -> None:
    assert one.shape == other.shape
    assert float((one - other).abs().max()) <= within * max(1.0, float(other.abs().max()))


@every
def test_without_a_context_features_are_those_of_the_model(kind: str) -> None:
    made, model, tokenizer = tower(kind), tiny_pairs.model(kind), tiny_pairs.tokenizer(kind)
    with torch.no_grad():
        found = made.features(*words(made, NAMES))
        given = tokenizer(NAMES, padding="max_length", max_length=LONGEST[kind], return_tensors="pt")
        mask = {} if kind == "siglip" else {"attention_mask": given.attention_mask}
        expected = model.get_text_features(input_ids=given.input_ids, **mask).pooler_output
    assert found.shape == (1, len(NAMES), made.hidden)
    same(found[0], expected, 1e-6)
    assert float((found[0, 0] - found[0, 1]).abs().max()) > 1e-2


@every
@places
@contexts
def test_with_a_context_features_and_gradients_are_those_of_the_model_with_the_rows_as_words(
    kind: str, placement: Placement, sets: int, each: int, deep: int
) -> None:
    made, context = tower(kind), vectors(sets, each, deep)
    found = value_and_gradient(made.features(*words(made, NAMES), context, placement), context)
    expected = value_and_gradient(by_hand(kind, NAMES, context, placement), context)
    same(found[0], expected[0])
    same(found[1], expected[1])
    assert all(float(part.abs().max()) > 1e-4 for part in found[1].unbind(2))


@places
@contexts
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cut_and_shared_sequences_change_nothing(
    placement: Placement, sets: int, each: int, deep: int, attention: str
) -> None:
    context, found = vectors(sets, each, deep), []
    for truncate, share in ((False, False), (True, False), (False, True), (True, True)):
        made = tower("clip", truncate=truncate, share=share)
        made.model.set_attn_implementation(attention)
        found.append(value_and_gradient(made.features(*words(made, NAMES), context, placement), context))
    for value, gradient in found[1:]:
        same(value, found[0][0])
        same(gradient, found[0][1])


@pytest.mark.parametrize(("count", "rows"), [(1, ROWS), (2, ROWS), (60, ROWS), (40, 60)])
def test_any_number_of_classes(count: int, rows: int) -> None:
    """With many rows, one sequence of several classes has more tokens than the model has positions."""
    names, context = (NAMES * 12)[:count], vectors(1, 1, 1, rows)
    made, plain = tower("clip"), tower("clip", truncate=False, share=False)
    found = value_and_gradient(made.features(*words(made, names), context), context)
    expected = value_and_gradient(plain.features(*words(plain, names), context), context)
    same(found[0], expected[0])
    same(found[1], expected[1])


def test_the_model_runs_fewer_tokens() -> None:
    """Sixty classes: one head for several of them, and no padding."""
    counted: list[int] = []
    for settings in ({"truncate": False, "share": False}, {"share": False}, {}):
        made = tower("clip", **settings)
        seen: list[tuple[int, ...]] = []
        made.text.encoder.layers[0].register_forward_pre_hook(
            lambda layer, given, seen=seen: seen.append(given[0].shape)
        )
        made.features(*words(made, NAMES * 12), vectors(1, 1, 1))
        counted.append(seen[0][0] * seen[0][1])
    tokens = sum(len(made.ids(name)) + 1 for name in NAMES * 12)
    assert counted[0] == 60 * 77
    assert counted[1] == 60 * (1 + ROWS + 6 + 1)
    assert counted[2] < 1.5 * tokens


@every
def test_words_may_be_padded_in_front(kind: str) -> None:
    made, context = tower(kind), vectors(1, 1, 1)
    ids, mask = words(made, NAMES)
    same(made.features(ids.flip(1), mask.flip(1)), made.features(_turned(ids, mask), mask))
    with torch.no_grad():
        found = made.features(ids.flip(1), mask.flip(1), context)
        same(found, made.features(_turned(ids, mask), mask, context))


def _turned(ids: Tensor, mask: Tensor) -> Tensor:
    """The real words of each class in the opposite order."""
    return torch.stack([torch.cat([row[real].flip(0), row[~real]]) for row, real in zip(ids, mask, strict=True)])


@every
def test_a_context_of_float32_on_a_model_of_bfloat16(kind: str) -> None:
    made = tower_of(tiny_pairs.model(kind).to(torch.bfloat16).requires_grad_(False), tiny_pairs.tokenizer(kind))
    context = vectors(1, 1, 2)
    found = made.features(*words(made, NAMES), context)
    assert found.dtype == torch.bfloat16
    gradient = torch.autograd.grad(found.float().sum(), context)[0]
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()


@every
def test_widths_and_layers(kind: str) -> None:
    made = tower(kind)
    assert (made.width, made.layers) == (tiny_pairs.WIDTH, 2)
    assert made.hidden == (tiny_pairs.WIDTH if kind == "siglip" else tiny_pairs.JOINT)
    assert made.ids("red cat") == [made.tokenizer.convert_tokens_to_ids(word) for word in ("red", "cat")]


@every
def test_too_long_prompts_are_refused(kind: str) -> None:
    made = tower(kind)
    with pytest.raises(ConfigError, match=f"takes {LONGEST[kind]}; use fewer rows") as caught:
        made.features(*words(made, NAMES), vectors(1, 1, 1, rows=80))
    assert "\n" not in str(caught.value)
    made.features(*words(made, ["cat"]), vectors(1, 1, 1, rows=LONGEST[kind] - (2 if kind == "siglip" else 3)))


def test_contexts_that_do_not_fit_are_refused() -> None:
    made = tower("clip")
    given = words(made, NAMES)
    with pytest.raises(ConfigError, match="a context for 3 classes"):
        made.features(*given, vectors(1, 3, 1))
    with pytest.raises(ConfigError, match="3 layers does not fit"):
        made.features(*given, vectors(1, 1, 3))
    with pytest.raises(ConfigError, match="4 rows does not fit"):
        made.features(*given, vectors(1, 1, 1), (("before_answer", 3),))
    with pytest.raises(ConfigError, match="no place 'here'"):
        made.features(*given, vectors(1, 1, 1), (("here", 4),))
    with pytest.raises(ConfigError, match="does not fit placement 'after_bos'"):
        made.features(*given, vectors(1, 1, 1), "after_bos")


def test_other_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="no two-tower model"):
        tower_of(tiny.model("bert"), tiny.tokenizer())
    with pytest.raises(ConfigError, match="puts no end token"):
        tower_of(tiny_pairs.clip(), tiny.tokenizer(specials="none"))
    without = tiny_pairs.pair()
    without.text_model.pooler = None
    with pytest.raises(ConfigError, match="has no pooler"):
        tower_of(without, tiny_pairs.tokenizer("pair"))
    of_clip = tiny_pairs.pair()
    of_clip.text_model = tiny_pairs.clip().text_model
    with pytest.raises(ConfigError, match="no text tower that is known"):
        tower_of(of_clip, tiny_pairs.tokenizer("clip"))


def test_rows_are_taken_in_the_order_of_the_places() -> None:
    assert sides("front", 2) == ((0, 1), ())
    assert sides("end", 2) == ((), (0, 1))
    assert sides((("after_answer", 1), ("before_answer", 2)), 3) == ((1, 2), (0,))


def test_a_packed_sequence_shows_each_class_what_is_shared_and_itself() -> None:
    layout = arranged((1, 2), 2, (0,), (), (1, 1), room=100)
    assert layout.owner.tolist() == [[-1, -1, 0, 0, 1, 1, 1]]
    assert layout.position.tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert layout.end.tolist() == [3, 6]
    assert layout.seen[0, 6].tolist() == [True, True, False, False, True, True, True]
    assert layout.seen[0, 2].tolist() == [True, True, True, False, False, False, False]
