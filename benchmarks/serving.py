"""How fast requests for many prompts are answered: the engine, PEFT, and the least arithmetic that would do.

Knows no library's internals; models have random weights, since only shapes cost time.

    python benchmarks/serving.py run                     # about 6 minutes on one core; results/serving.jsonl
    python benchmarks/serving.py run --cells gpt2-20-32 --rounds 5 --layers 2
    python benchmarks/serving.py table

A batch is 16 requests, each for another prompt of l rows and with S tokens of text; answers are probabilities of two
labels. PEFT has no batches of several prompts for prompt tuning, so it answers one request after the other, with all
logits or with those of the last position (`logits_to_keep=1`). PEFT gets token ids; the engine gets texts, and its time
includes tokenizing them and making labels of scores. "floor" is the bare model on one batch by hand: the prompts' keys
and values gathered (GPT-2) or prompts and texts run together (T5), and two words of the head.

The clock is the CPU time of this process with one thread. A round runs each variant once, in an order that rotates;
a ratio is the median over rounds of time / time of the engine.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PromptTuningConfig, TaskType, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from cells import read
from promptuary import Engine, registry, runs
from promptuary.backbones.base import Backbone
from promptuary.building import build_method, hold_backbone
from promptuary.tuned import Tuned

RESULTS = Path(__file__).parent / "results" / "serving.jsonl"
REQUESTS = 16
CELLS = {
    f"{kind}-{rows}-{tokens}": (kind, rows, tokens)
    for kind, rows, tokens in (("gpt2", 20, 32), ("gpt2", 100, 32), ("gpt2", 100, 16), ("t5", 20, 32), ("t5", 100, 32))
}
"""Name -> model, rows of each prompt, tokens of each text."""
SPECIALS, SIZES = {"<pad>": 0, "</s>": 1, "<unk>": 2}, {"gpt2": 50257, "t5": 32128}
LABELS = {"yes": "w100", "no": "w200"}


def model(kind: str, layers: int | None) -> Any:
    """GPT-2 or T5-base in shape, with random weights."""
    torch.manual_seed(0)
    size = {"vocab_size": SIZES[kind], "pad_token_id": 0, "eos_token_id": 1}
    if kind == "gpt2":
        config = transformers.GPT2Config(**size, bos_token_id=1, n_layer=layers or 12)
        return transformers.GPT2LMHeadModel(config).eval()
    shape = {"d_model": 768, "d_ff": 3072, "num_heads": 12, "num_layers": layers or 12, "d_kv": 64}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**size, **shape, decoder_start_token_id=0)
    ).eval()


def tokenizer(kind: str) -> Any:
    """One word, one token; T5's texts end in a special one."""
    words = {**SPECIALS, **{f"w{number}": number for number in range(len(SPECIALS), SIZES[kind])}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if kind == "t5":
        raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def prompts(backbone: Backbone, rows: int) -> list[Tuned]:
    """A prompt for each request."""
    found = registry.load("methods", "prompt_tuning")
    config = found.Config.read({"name": "prompt_tuning", "num_virtual_tokens": rows}, where="method")
    kind = registry.load("tasks", "classify")
    task = kind(kind.Config.read({"template": "{text} {mask}", "labels": LABELS, "name": "classify"}, where="task"))
    generator, made = torch.Generator().manual_seed(1), []
    for _ in range(REQUESTS):
        own = Tuned(backbone, task, build_method(config, backbone.shape))
        with torch.no_grad():
            for group in own.trained():
                group.parameter.copy_(torch.randn(group.parameter.shape, generator=generator) / 10)
        made.append(own)
    return made


class Peft:
    """PEFT with the same prompts, one request after the other."""

    def __init__(self, base: Any, tables: list[Tensor]) -> None:
        """An adapter for each table of rows."""
        self.decodes = base.config.is_encoder_decoder
        kind = TaskType.SEQ_2_SEQ_LM if self.decodes else TaskType.CAUSAL_LM
        config = PromptTuningConfig(task_type=kind, num_virtual_tokens=len(tables[0]))
        self.model = get_peft_model(base, config, adapter_name="p0")
        for number in range(1, len(tables)):
            self.model.add_adapter(f"p{number}", config)
        for number, table in enumerate(tables):
            # it makes twice the rows for an encoder-decoder, and uses the first half
            self.model.prompt_encoder[f"p{number}"].embedding.weight.data[: len(table)].copy_(table)
        self.model.eval()

    @torch.no_grad()
    def __call__(self, ids: Tensor, words: Tensor, **options: Any) -> Tensor:
        """Logits of the words behind each text, [b, w]."""
        found = []
        for number, row in enumerate(ids):
            self.model.set_adapter(f"p{number}")
            given = {"input_ids": row[None], "attention_mask": torch.ones_like(row)[None], **options}
            if self.decodes:
                given["decoder_input_ids"] = torch.zeros(1, 1, dtype=torch.long)
            found.append(self.model(**given).logits[:, -1, words])
        return torch.cat(found)


def floor(base: Any, tables: list[Tensor], ids: Tensor, words: Tensor) -> Callable[[], Tensor]:
    """One batch by hand, with what can be computed beforehand computed."""
    bank, head = torch.stack(tables), base.get_output_embeddings().weight[words].detach().clone()
    if base.config.is_encoder_decoder:
        start = torch.zeros(len(ids), 1, dtype=torch.long)

        @torch.no_grad()
        def together() -> Tensor:
            given = torch.cat([bank, base.get_input_embeddings()(ids)], dim=1)
            states = base.encoder(inputs_embeds=given).last_hidden_state
            last = base.decoder(input_ids=start, encoder_hidden_states=states, use_cache=False).last_hidden_state
            scale = base.config.d_model**-0.5 if base.config.tie_word_embeddings else 1.0
            return (last[:, 0] * scale) @ head.T

        return together
    with torch.no_grad():
        cache = base.base_model(inputs_embeds=bank, use_cache=True).past_key_values
        store = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    which = torch.arange(len(ids))

    @torch.no_grad()
    def behind() -> Tensor:
        cache = transformers.DynamicCache(config=base.config)
        for number, (keys, values) in enumerate(store):
            cache.update(keys[which], values[which], number)
        return base.base_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1] @ head.T

    return behind


def measure(name: str, rounds: int, layers: int | None) -> dict[str, Any]:
    """The row of a cell."""
    kind, length, tokens = CELLS[name]
    base = model(kind, layers)
    bare, other = copy.deepcopy(base), copy.deepcopy(base)
    backbone = hold_backbone(base, tokenizer(kind), family="seq2seq" if kind == "t5" else "causal", name=kind)
    tuned = prompts(backbone, length)
    engine = Engine(backbone)
    for number, own in enumerate(tuned):
        engine.add(f"p{number}", own)
    generator, count = torch.Generator().manual_seed(2), tokens - (kind == "t5")
    drawn = torch.randint(300, 30_000, (REQUESTS, count), generator=generator)
    asked = [(f"p{number}", " ".join(f"w{token}" for token in row)) for number, row in enumerate(drawn.tolist())]
    ids = torch.tensor([own.rows([{"text": text}], labelled=False)[0].encoded.ids for own, (_, text) in zip(
        tuned, asked, strict=True)])  # fmt: skip
    assert ids.shape == (REQUESTS, tokens)
    tables = [own.prompt(backbone.probe()).as_rows() for own in tuned]
    words = torch.tensor([int(word[1:]) for word in LABELS.values()])
    peft = Peft(other, tables)
    variants: dict[str, Callable[[], Any]] = {
        "engine": lambda: engine.score(asked),
        "peft": lambda: peft(ids, words),
        "floor": floor(bare, tables, ids, words),
    }
    if kind == "gpt2":
        variants["peft, logits_to_keep"] = lambda: peft(ids, words, logits_to_keep=1)

    def scores(found: Any) -> Tensor:
        return found.softmax(-1) if isinstance(found, Tensor) else torch.tensor([[*one.values()] for one in found])

    # the first runs, which also fill what is kept; each request alone is answered by its own prompt
    found = {label: scores(run()) for label, run in variants.items()}
    alone = scores([own.predict([text])[0].scores for own, (_, text) in zip(tuned, asked, strict=True)])
    apart = {label: float((one - found["engine"]).abs().max()) for label, one in {**found, "alone": alone}.items()}
    times: dict[str, list[float]] = {label: [] for label in variants}
    order = list(variants)
    for number in range(rounds):
        for label in order[number % len(order) :] + order[: number % len(order)]:
            start = time.process_time()
            variants[label]()
            times[label].append(time.process_time() - start)
    ratios = {
        label: [one / mine for one, mine in zip(spent, times["engine"], strict=True)] for label, spent in times.items()
    }
    return {
        "cell": [kind, length, tokens],
        "requests": REQUESTS,
        "layers": layers or 12,
        "median_ms": {label: round(1e3 * statistics.median(spent), 1) for label, spent in times.items()},
        "ratio": {label: round(statistics.median(found), 3) for label, found in ratios.items()},
        "ratio_min": {label: round(min(found), 3) for label, found in ratios.items()},
        "ratio_max": {label: round(max(found), 3) for label, found in ratios.items()},
        "largest_difference": apart,
        "same_labels": bool((alone.argmax(1) == found["engine"].argmax(1)).all()),
        "rounds": rounds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of the rows."""
    out = [
        "| model | l | S | engine, ms | PEFT / engine (min to max) | PEFT with logits_to_keep / engine "
        "| floor / engine | engine - alone |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        kind, length, tokens = row["cell"]

        def shown(label: str, row: dict[str, Any] = row) -> str:
            if label not in row["ratio"]:
                return "-"
            return f"{row['ratio'][label]:.2f} ({row['ratio_min'][label]:.2f} to {row['ratio_max'][label]:.2f})"

        out.append(
            f"| {kind} | {length} | {tokens} | {row['median_ms']['engine']:.0f} | {shown('peft')} "
            f"| {shown('peft, logits_to_keep')} | {shown('floor')} | {row['largest_difference']['alone']:.0e} |"
        )
    return "\n".join(out)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, help="fewer layers than the real 12, for a trial; nothing is written")
    arguments = parser.parse_args()
    if arguments.what == "table":
        print(table(read(RESULTS)))
        return
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    for name in arguments.cells:
        row = measure(name, arguments.rounds, arguments.layers)
        row |= {
            "machine": f"{runs.processor()}, {torch.get_num_threads()} thread(s)",
            "versions": runs.versions(),
            "command": f"python benchmarks/serving.py run --cells {name} --rounds {arguments.rounds}",
        }
        print(json.dumps({key: row[key] for key in ("cell", "median_ms", "ratio", "largest_difference")}), flush=True)
        if arguments.layers is None:
            kept = [one for one in read(RESULTS) if one["cell"] != row["cell"]]
            RESULTS.write_text("".join(json.dumps(one) + "\n" for one in [*kept, row]), encoding="utf-8")


if __name__ == "__main__":
    main()
