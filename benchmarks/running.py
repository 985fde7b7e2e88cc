"""Situations of a model that runs with a prompt: one forward pass, and generate().

Knows no library by name. A situation returns a number that is zero, up to rounding, when the library is right.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

from libraries import REPEATS, ROWS, TEXTS, Library, alone, batch, greedy, ids, model, one, rows
from measure import CAUSAL, LOGITS, LOSS, TOKENS, TWO, differing, far, situation

# ---- forward --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def padded_forward(side: str, library: Library, kind: str) -> float:
    raw, prompt, given = model(kind), rows(model(kind)), batch(side)
    if side == "left":  # as transformers' documentation asks for; GPT-2 alone would be wrong without
        given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with library.on(model(kind), prompt) as host:
        found = host.text(host.model(**given).logits, given)
    mask = given["attention_mask"].bool()
    return max(
        far(found[row][mask[row]], alone(raw, ids(text), prompt).logits[0, ROWS:]) for row, text in enumerate(TEXTS)
    )


situation("left-padded batch, forward with position_ids", "forward", CAUSAL, LOGITS)(partial(padded_forward, "left"))
situation("right-padded batch, forward", "forward", (*CAUSAL, "bert", "roberta"), LOGITS)(
    partial(padded_forward, "right")
)


@situation("classifier on a padded batch", "forward", ("gpt2-cls", "llama-cls", "bert-cls"), LOGITS)
@torch.no_grad()
def padded_classifier(library: Library, kind: str) -> float:
    raw, prompt, given = model(kind), rows(model(kind)), batch("right")
    with library.on(model(kind), prompt) as host:
        found = host.model(**given).logits
    return max(far(found[row], alone(raw, ids(text), prompt).logits[0]) for row, text in enumerate(TEXTS))


FAMILIES = ("bert-cls", "roberta-cls", "deberta-cls", "modernbert-cls", "distilbert-cls", "albert-cls", "electra-cls")


@situation("encoder families, classification", "forward", FAMILIES, LOGITS)
@torch.no_grad()
def families(library: Library, kind: str) -> float:
    raw, prompt = model(kind), rows(model(kind))
    with library.on(model(kind), prompt) as host:
        return far(host.model(**one()).logits, alone(raw, ids(), prompt).logits)


@situation(
    "returned logits are those of the text", "forward", ("llama", "bert", "bert-tokens", "t5"), "positions too many"
)
@torch.no_grad()
def positions(library: Library, kind: str) -> float:
    given, base = one(), model(kind)
    more = {"decoder_input_ids": given["input_ids"]} if kind == "t5" else {}
    with library.on(base, rows(base)) as host:
        return host.model(**given, **more).logits.shape[1] - given["input_ids"].shape[1]


@situation("loss of a causal model", "forward", TWO, LOSS)
@torch.no_grad()
def causal_loss(library: Library, kind: str) -> float:
    raw, prompt, given = model(kind), rows(model(kind)), one()
    with library.on(model(kind), prompt) as host:
        found = host.model(**given, labels=given["input_ids"]).loss
    scores = alone(raw, ids(), prompt).logits[0]
    # the first token of a text is counted by PEFT, which predicts it from the prompt, and not by transformers
    targets = torch.tensor(ids())
    losses = torch.nn.functional.cross_entropy(scores[ROWS - 1 : -1], targets, reduction="none")
    return min(abs(float(found - losses.mean())), abs(float(found - losses[1:].mean())))


@situation("token classification with labels", "forward", ("bert-tokens",), LOSS)
@torch.no_grad()
def token_labels(library: Library, kind: str) -> float:
    raw, prompt, given = model(kind), rows(model(kind)), one()
    labels = given["input_ids"] % 3
    with library.on(model(kind), prompt) as host:
        found = host.model(**given, labels=labels).loss
    scores = alone(raw, ids(), prompt).logits[0, ROWS:]
    return abs(float(found - torch.nn.functional.cross_entropy(scores, labels[0])))


@situation("question answering, loss of the labelled span", "forward", ("bert-qa",), LOSS)
@torch.no_grad()
def span_loss(library: Library, kind: str) -> float:
    raw, prompt, given = model(kind), rows(model(kind)), one()
    begin, end = torch.tensor([3]), torch.tensor([5])
    with library.on(model(kind), prompt) as host:
        found = host.model(**given, start_positions=begin, end_positions=end).loss
    answer, loss = alone(raw, ids(), prompt), torch.nn.functional.cross_entropy
    # over the text alone, or over prompt and text with the labels moved: both are sound
    text = (loss(answer.start_logits[:, ROWS:], begin) + loss(answer.end_logits[:, ROWS:], end)) / 2
    whole = (loss(answer.start_logits, begin + ROWS) + loss(answer.end_logits, end + ROWS)) / 2
    return min(abs(float(found - text)), abs(float(found - whole)))


@situation("question answering, place of the answer", "forward", ("bert-qa",), "positions off")
@torch.no_grad()
def span_place(library: Library, kind: str) -> float:
    raw, prompt = model(kind), rows(model(kind))
    with library.on(model(kind), prompt) as host:
        found = host.model(**one())
    right = alone(raw, ids(), prompt)
    return sum(
        abs(int(getattr(found, name).argmax()) - int(getattr(right, name)[:, ROWS:].argmax()))
        for name in ("start_logits", "end_logits")
    )


@situation("packed texts (position_ids start again)", "forward", TWO, LOGITS)
@torch.no_grad()
def packed(library: Library, kind: str) -> float:
    raw, prompt, texts = model(kind), rows(model(kind)), [ids(text) for text in TEXTS[:2]]
    joined = torch.tensor([[token for text in texts for token in text]])
    counted = torch.tensor([[place for text in texts for place in range(len(text))]])
    with library.on(model(kind), prompt) as host:
        found = host.model(input_ids=joined, position_ids=counted).logits[0, -joined.shape[1] :]
    expected = [alone(raw, text, prompt).logits[0, ROWS:] for text in texts]
    return far(found, torch.cat(expected))


@situation("a prompt for each row of a batch, forward", "forward", TWO, LOGITS)
@torch.no_grad()
def mixed_forward(library: Library, kind: str) -> float:
    raw, given = model(kind), batch("right", (TEXTS[2], TEXTS[2]))
    prompts = [rows(raw), rows(raw, 2)]
    with library.on(model(kind), *prompts) as host:
        found = host.text(host.model(**given, **{library.by_name: ["b", library.first]}).logits, given)
    return max(far(found[row], alone(raw, ids(), prompts[1 - row]).logits[0, ROWS:]) for row in (0, 1))


@situation("prompt switched off", "forward", (*TWO, "t5", "bert-cls"), LOGITS)
@torch.no_grad()
def switched_off(library: Library, kind: str) -> float:
    given, base = one(), model(kind)
    if kind == "t5":
        given["decoder_input_ids"] = given["input_ids"]
    return far(library.without(base, rows(base), given).logits, model(kind)(**given).logits)


# ---- generate -------------------------------------------------------------------------------------------------------


def padded_generate(side: str, library: Library, kind: str) -> float:
    raw, prompt = model(kind), rows(model(kind))
    with library.on(model(kind), prompt) as host:
        found = host.written(batch(side))
    return differing(found, [greedy(raw, ids(text), prompt) for text in TEXTS])


situation("left-padded batch", "generate", CAUSAL, TOKENS)(partial(padded_generate, "left"))
situation("right-padded batch of an encoder-decoder", "generate", ("t5",), TOKENS)(partial(padded_generate, "right"))

MODES: dict[str, dict[str, Any]] = {
    "one text": {},
    "static cache": {"cache_implementation": "static"},
    "use_cache=False": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 4},
}


def mode(options: dict[str, Any], library: Library, kind: str, text: str = TEXTS[2]) -> float:
    raw, prompt = model(kind), rows(model(kind))
    with library.on(model(kind), prompt) as host:
        found = host.written(one(text), **options)
    return differing(found, [greedy(raw, ids(text), prompt)])


for _name, _options in MODES.items():
    situation(_name, "generate", TWO, TOKENS)(partial(mode, _options))
situation("prompt lookup", "generate", TWO, TOKENS)(partial(mode, {"prompt_lookup_num_tokens": 3}, text=REPEATS))

RULES: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "repetition penalty": (
        {"repetition_penalty": 3.0},
        lambda: transformers.RepetitionPenaltyLogitsProcessor(3.0),
    ),
    "no_repeat_ngram_size": (
        {"no_repeat_ngram_size": 1},
        lambda: transformers.NoRepeatNGramLogitsProcessor(1),
    ),
}


def rule(options: dict[str, Any], make: Callable[[], Any], library: Library, kind: str) -> float:
    wrong = 0
    for text, seed in ((TEXTS[2], 1), (TEXTS[0], 4)):  # with the second, Llama writes the token of padding
        raw, prompt = model(kind), rows(model(kind), seed)
        with library.on(model(kind), prompt) as host:
            found = host.written(one(text), **options)
        wrong += differing(found, [greedy(raw, ids(text), prompt, rule=make())])
    return wrong


for _name, (_options, _make) in RULES.items():
    situation(_name, "generate", CAUSAL, TOKENS)(partial(rule, _options, _make))


def searched(options: dict[str, Any], library: Library, kind: str) -> float:
    """Against the bare model's own search on embeddings."""
    raw, prompt = model(kind), rows(model(kind))
    with torch.no_grad():
        embedded = torch.cat([prompt[None], raw.get_input_embeddings()(torch.tensor([ids()]))], dim=1)
    torch.manual_seed(1)
    mask = torch.ones(embedded.shape[:2], dtype=torch.long)
    expected = raw.generate(
        inputs_embeds=embedded, attention_mask=mask, **{"max_new_tokens": 8, "do_sample": False, **options}
    ).tolist()
    with library.on(model(kind), prompt) as host:
        torch.manual_seed(1)
        return differing(host.written(one(), **options), expected)


for _name, _options in {
    "beams": {"num_beams": 3},
    "several beams returned": {"num_beams": 3, "num_return_sequences": 3},
    "several samples (same seed)": {"do_sample": True, "num_return_sequences": 3},
}.items():
    situation(_name, "generate", TWO, TOKENS)(partial(searched, _options))


@situation("second turn on the cache of the first", "generate", TWO, TOKENS)
def second_turn(library: Library, kind: str) -> float:
    raw, prompt, given, wrong = model(kind), rows(model(kind)), one(), 0
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    for more in ([14, 15, 16, 17], [35, 36], [20, 21]):
        with library.on(model(kind), prompt) as host:
            first = host.model.generate(**given, **options)
            history = torch.cat([first.sequences, torch.tensor([more])], dim=1)
            again = {"input_ids": history, "attention_mask": torch.ones_like(history)}
            found = host.written(again, past_key_values=first.past_key_values)
        wrong += differing(found, [greedy(raw, history[0].tolist(), prompt)])
    return wrong


@situation("inputs_embeds instead of input_ids", "generate", TWO, TOKENS)
def from_vectors(library: Library, kind: str) -> float:
    raw, prompt, given = model(kind), rows(model(kind)), one()
    with torch.no_grad():
        vectors = raw.get_input_embeddings()(given["input_ids"])
    mask = given["attention_mask"]
    with library.on(model(kind), prompt) as host:
        found = host.model.generate(inputs_embeds=vectors, attention_mask=mask, max_new_tokens=8, do_sample=False)
    return differing(found.tolist(), [greedy(raw, ids(), prompt)])


@situation("a prompt for each row of a batch", "generate", TWO, TOKENS)
def mixed_generate(library: Library, kind: str) -> float:
    raw, given = model(kind), batch("left", (TEXTS[2], TEXTS[2]))
    prompts = [rows(raw), rows(raw, 2)]
    with library.on(model(kind), *prompts) as host:
        found = host.written(given, **{library.by_name: ["b", library.first]})
    return differing(found, [greedy(raw, ids(), prompt) for prompt in reversed(prompts)])


@situation("two threads, each with its own prompt", "generate", TWO, TOKENS)
def threads(library: Library, kind: str) -> float:
    raw, found = model(kind), dict[int, list[list[int]]]()
    prompts = [rows(raw), rows(raw, 2)]

    def work(number: int, host: Any) -> None:
        found[number] = host.written(one())

    library.at_once(model(kind), prompts, work)
    return sum(differing(found[n], [greedy(raw, ids(), prompt)]) for n, prompt in enumerate(prompts))
