"""What a training step costs: operations and bytes kept for the backward pass, against formulas from its config.

Knows no measured number: each formula counts the matrix products and the tensors that their derivatives need.

Notation: b rows, s tokens of a text, v rows of the prompt, n layers, d width, f width between, a = heads x width of a
head, p weights of all matrices of a layer. A product over t positions takes 2 t p operations forward and, with frozen
weights, 2 t p back to its input. The two products of attention over q queries and t keys take 4 q t a, and twice that
back, since both factors of each are activations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

import tiny
from clock import flops, saved_bytes
from promptuary import registry
from promptuary.building import build_method
from promptuary.tasks.base import Task
from promptuary.tasks.classify import Classify, ClassifyConfig
from promptuary.tasks.generate import Generate, GenerateConfig
from promptuary.training import seeded
from promptuary.tuned import Tuned
from promptuary.types import Batch, View

ROWS, WORDS = 4, {"first": "good", "second": "bad", "third": "maybe"}
VOCABULARY = 2048
"""Larger than that of the tiny models, so that a head that computes too much is seen."""
FLOAT, LONG = 4, 8


def tuned(kind: str, method: str = "prompt_tuning", task: str = "words", *, eager: bool = True,
          backbone: dict[str, Any] | None = None, **settings: Any) -> Tuned:  # fmt: skip
    """A method on a tiny model; torch counts no operations of the CPU's fused attention, hence the eager one."""
    model, other = tiny.model(kind), tiny.backbone(kind, **(backbone or {}))
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    base = type(other)(model, other.tokenizer, other.config)
    base.model.set_attn_implementation("eager" if eager else "sdpa")
    words = ClassifyConfig(template="{text} it was {mask}", labels=WORDS)
    made: dict[str, Callable[[], Task]] = {
        "words": lambda: Classify(words),
        "head": lambda: Classify(words.model_copy(update={"reading": "head"})),
        "text": lambda: Generate(GenerateConfig(template="{text} answer : {mask}", max_new_tokens=5)),
    }
    found = registry.load("methods", method)
    config = found.Config.read({"name": method, **found.tiny, **settings}, where="method")
    built = Tuned(base, made[task](), build_method(config, base.shape), max_length=60).initialise(seeded(0)).train(True)
    built.loss(batch(built, words=3))  # a backbone tries once whether its model can share
    return built


def batch(made: Tuned, words: int = 9, rows: int = ROWS) -> Batch:
    """Texts of one length that differ from their first word on."""
    texts = [" ".join(tiny.WORDS[(7 * row + 3 * place + 1) % 60] for place in range(words)) for row in range(rows)]
    examples = [{"text": text, "label": list(WORDS)[n % 3], "target": "very good"} for n, text in enumerate(texts)]
    return made.batch(made.rows(examples, labelled=True))


def step(made: Tuned, given: Batch) -> Callable[[], None]:
    """Forward and backward."""
    return lambda: made.loss(given).total.backward()


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a decoder-only model: `kv`, the weights through which a gradient of keys and values alone goes back."""

    n: int
    d: int
    f: int
    heads: int
    a: int
    p: int
    kv: int

    @classmethod
    def of(cls, made: Tuned) -> Sizes:
        config = made.backbone.model.config
        d, n, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
        if config.model_type == "gpt2":
            f = config.n_inner or 4 * d
            # one matrix gives queries, keys and values together
            return cls(n, d, f, heads, d, 3 * d * d + d * d + 2 * d * f, 3 * d * d)
        f, width = config.intermediate_size, d // heads
        kv = 2 * d * config.num_key_value_heads * width
        return cls(n, d, f, heads, d, d * d + kv + d * d + 3 * d * f, kv)

    def forward(self, rows: int, queries: int, keys: int) -> int:
        """All layers over so many positions of each row."""
        return self.n * rows * queries * (2 * self.p + 4 * keys * self.a)

    def backward(self, rows: int, queries: int, keys: int) -> int:
        """The same back to the inputs of all layers."""
        return self.n * rows * queries * (2 * self.p + 8 * keys * self.a)

    def whole(self, rows: int, positions: int) -> int:
        """A step in which every row runs all of its positions."""
        return self.forward(rows, positions, positions) + self.backward(rows, positions, positions)

    def shared(self, rows: int, s: int, v: int) -> int:
        """A step in which the prompt runs once and the rows behind it.

        The prompt's last layer is asked for keys and values only, so no gradient comes back through the rest of it.
        """
        once = self.forward(1, v, v) + self.backward(1, v, v) * (self.n - 1) // self.n + 2 * v * self.kv
        return once + self.forward(rows, s, v + s) + self.backward(rows, s, v + s)

    def head(self, reads: int, words: int) -> int:
        """Logits of so many words at so many positions, and back to the states."""
        return 2 * 2 * reads * self.d * words


# ---- decoder-only models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["words", "head"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_step_of_a_causal_model_runs_the_prompt_once_or_in_every_row(kind: str, share: bool, task: str) -> None:
    made = tuned(kind, task=task, num_virtual_tokens=12, backbone={"share_prefix": share})
    given, sizes = batch(made), Sizes.of(made)
    # what all texts begin with is shared as well, unless states are read from there on, as for a head
    common = len(made.backbone.prefix) if share and task == "words" else 0
    s, v = given.input_ids.shape[1] - common, 12 + common
    expected = sizes.shared(ROWS, s, v) if share else sizes.whole(ROWS, v + s)
    # a trained head has a gradient of its own weights besides that of the states
    expected += sizes.head(ROWS, 3) * (3 if task == "head" else 2) // 2
    close(flops(step(made, given)), expected)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_written_answers_read_the_whole_vocabulary_at_their_own_positions_only(kind: str, share: bool) -> None:
    made = tuned(kind, task="text", num_virtual_tokens=12, backbone={"share_prefix": share})
    given, sizes = batch(made), Sizes.of(made)
    assert given.target_ids is not None
    answer, common = given.target_ids.shape[1], len(made.backbone.prefix) if share else 0
    s, v = given.input_ids.shape[1] + answer - common, 12 + common
    expected = sizes.shared(ROWS, s, v) if share else sizes.whole(ROWS, v + s)
    close(flops(step(made, given)), expected + sizes.head(ROWS * answer, VOCABULARY))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_without_narrow_head_every_position_reads_the_whole_vocabulary(kind: str) -> None:
    made = tuned(kind, num_virtual_tokens=12, backbone={"narrow_head": False})
    given, sizes = batch(made), Sizes.of(made)
    positions = 12 + given.input_ids.shape[1]
    close(flops(step(made, given)), sizes.whole(ROWS, positions) + sizes.head(ROWS * positions, VOCABULARY))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_texts_before_their_prompt_run_in_the_first_pass_only(kind: str) -> None:
    made = tuned(kind, num_virtual_tokens=6, placement="end")
    given, sizes, v = batch(made, words=20), Sizes.of(made), 6
    s = given.input_ids.shape[1]
    behind = sizes.forward(ROWS, v, s + v) + sizes.backward(ROWS, v, s + v) + sizes.head(ROWS, 3)
    close(flops(step(made, given)), sizes.forward(ROWS, s, s) + behind)
    close(flops(step(made, given)), behind)
    made = tuned(kind, num_virtual_tokens=6, placement="end", backbone={"kept_mib": 0})
    for _ in range(2):
        close(flops(step(made, given)), sizes.forward(ROWS, s, s) + behind)


# ---- masked models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", [True, False])
def test_a_step_of_bert_runs_its_head_at_the_mask_for_the_label_words(narrow: bool) -> None:
    made = tuned("bert", num_virtual_tokens=7, backbone={"narrow_head": narrow})
    given, config = batch(made), made.backbone.model.config
    d, f, n, t = config.hidden_size, config.intermediate_size, config.num_hidden_layers, 7 + given.input_ids.shape[1]
    body = n * t * (2 * 2 * (4 * d * d + 2 * d * f) + 12 * t * d)
    reads, words = (1, 3) if narrow else (t, VOCABULARY)
    close(flops(step(made, given)), ROWS * (body + reads * 2 * 2 * d * (d + words)))


# ---- encoder-decoders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", [True, False])
def test_a_step_of_t5_runs_its_decoder_on_one_position(narrow: bool) -> None:
    made = tuned("t5", num_virtual_tokens=7, backbone={"narrow_head": narrow})
    given, config = batch(made), made.backbone.model.config
    d, a, f, n, m = (
        config.d_model,
        config.num_heads * config.d_kv,
        config.d_ff,
        config.num_layers,
        config.num_decoder_layers,
    )
    t = 7 + given.input_ids.shape[1]
    encoder = n * t * (2 * 2 * (4 * d * a + 2 * d * f) + 12 * t * a)
    # a position of the decoder: its own attention, queries and outputs of the other, and what is between; and for
    # each of the t positions that it looks at, keys and values
    own, other, between, each = 2 * 4 * d * a, 2 * 2 * d * a, 2 * 2 * d * f, 2 * 2 * d * a
    decoder = m * (2 * (own + other + between + t * each) + 12 * a + 12 * t * a)
    # the decoder's first input is a token: nothing goes back through what only depends on it, which is the first
    # attention, the queries of the other and one of the two factors of its first product
    decoder -= own + 8 * a + 2 * d * a + 2 * t * a
    close(flops(step(made, given)), ROWS * (encoder + decoder + 2 * 2 * d * (3 if narrow else VOCABULARY)))


# ---- EPT's own modules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 4])
def test_ept_adds_its_own_products_once_per_step_whatever_the_batch(rows: int) -> None:
    s, m, r, spaces, k = 6, 40, 5, 4, 3
    own = {
        "num_virtual_tokens": s,
        "reference_length": 12,
        "max_tokens": m,
        "rank": r,
        "spaces": spaces,
        "space_dim": k,
    }
    ept, plain = tuned("t5", "ept", **own), tuned("t5", num_virtual_tokens=s)
    given, d = batch(ept, rows=rows), ept.backbone.shape.width
    table, fusion = 2 * m * r * d, 2 * 2 * s * m * d
    between = spaces * 2 * 2 * s * d * k + 2 * spaces * s * d + 2 * d * spaces
    # A B for the fusion and for the table; each factor of a product has a gradient
    modules = 3 * (2 * table + fusion + between)
    close(flops(step(ept, given)) - flops(step(plain, given)), modules)

    def alone() -> None:
        assert ept.method is not None
        found = ept.method.prompt(View())
        assert found.rows is not None
        assert found.offset is not None
        (found.rows.sum() + found.offset.table().sum()).backward()

    close(flops(alone), modules)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def gpt2_keeps(sizes: Sizes, rows: int, queries: int, *, shortened: bool = False) -> int:
    """Bytes of GPT-2's layers over so many positions of each row, without keys and values from before.

    Per position of a layer: the inputs of two norms with mean and deviation of each; queries, keys and values, the
    result of attention and a number per head; four factors of the activation, which transformers writes out. Then the
    last norm; `shortened`: of the last layer, only what leads to keys and values.
    """
    norm = sizes.d + 2
    layer = 2 * norm + 4 * sizes.d + sizes.heads + 4 * sizes.f
    return FLOAT * rows * queries * ((sizes.n - 1) * layer + (norm if shortened else layer + norm))


def gpt2_keeps_behind(sizes: Sizes, rows: int, queries: int, keys: int) -> int:
    """The same over positions behind others: all keys and values that they read, and the mask, for each layer."""
    return gpt2_keeps(sizes, rows, queries) + FLOAT * sizes.n * rows * keys * (2 * sizes.d + queries)


@pytest.mark.parametrize(
    "settings",
    [{}, {"backbone": {"share_prefix": False}}, {"placement": "end"}],
    ids=["prompt once", "prompt in every row", "prompt behind kept texts"],
)
def test_bytes_that_a_step_of_gpt2_keeps(settings: dict[str, Any]) -> None:
    made = tuned("gpt2", num_virtual_tokens=12, eager=False, **settings)
    given, sizes, v = batch(made), Sizes.of(made), 12
    s = given.input_ids.shape[1]
    step(made, given)()
    if "placement" in settings:
        ran, last, expected = ROWS * v, v, gpt2_keeps_behind(sizes, ROWS, v, s + v)
    elif "backbone" in settings:
        ran, last, expected = ROWS * (v + s), v + s, gpt2_keeps(sizes, ROWS, v + s)
    else:
        ran, last = v + ROWS * s, s
        expected = gpt2_keeps(sizes, 1, v, shortened=True) + gpt2_keeps_behind(sizes, ROWS, s, v + s)
    # which ids are prompt rows, and which rows they are; the states that answers are read from; words of the head
    expected += (LONG + 1) * ran + FLOAT * ROWS * last * sizes.d + FLOAT * sizes.d * 3
    close(saved_bytes(step(made, given), made.backbone.model.parameters()), expected)


def close(found: int, expected: int) -> None:
    """Within 1 %."""
    assert found == pytest.approx(expected, rel=0.01), (found, expected, found / expected)
