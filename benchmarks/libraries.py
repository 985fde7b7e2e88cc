"""One prompt on one model in two libraries, and what the bare model says by hand: what the situations compare.

Knows no situation. Each library is used as its own documentation says.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import promptuary
from promptuary import checkpoint
from promptuary.testing import tiny
from promptuary.tuned import Tuned

ROWS = 4
TEXTS = ("the sky is blue and the sea is not green", "a cat", "it was a very good review")
REPEATS = "it was a very good review and it was a very good"

_SMALL = {
    "vocab_size": tiny.SIZE,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 80,
    "pad_token_id": 0,
    "num_labels": 3,
}
HEADED: Mapping[str, Callable[[], Any]] = {
    "llama-cls": lambda: _headed("LlamaForSequenceClassification", "llama"),
    "gpt2-cls": lambda: _headed("GPT2ForSequenceClassification", "gpt2"),
    "bert-cls": lambda: _headed("BertForSequenceClassification", "bert"),
    "bert-tokens": lambda: _headed("BertForTokenClassification", "bert"),
    "bert-qa": lambda: _headed("BertForQuestionAnswering", "bert"),
    "roberta-cls": lambda: _headed("RobertaForSequenceClassification", "roberta"),
    "deberta-cls": lambda: _headed("DebertaV2ForSequenceClassification", "deberta"),
    "modernbert-cls": lambda: _headed("ModernBertForSequenceClassification", "modernbert"),
    "distilbert-cls": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            vocab_size=tiny.SIZE, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=80, num_labels=3
        )
    ),
    "albert-cls": lambda: transformers.AlbertForSequenceClassification(
        transformers.AlbertConfig(**_SMALL, embedding_size=16, hidden_size=32)
    ),
    "electra-cls": lambda: transformers.ElectraForSequenceClassification(
        transformers.ElectraConfig(**_SMALL, embedding_size=16, hidden_size=32)
    ),
}
"""Tiny models that promptuary.testing.tiny does not have: heads of every kind, and more encoders."""


def _headed(name: str, kind: str) -> Any:
    config = tiny.model(kind).config
    config.num_labels, config.pad_token_id = (2 if name.endswith("QuestionAnswering") else 3), 0
    return getattr(transformers, name)(config)


def model(kind: str, seed: int = 0) -> Any:
    """A tiny random model; it never ends a text by itself, so that the same number of tokens is compared."""
    if kind not in HEADED:
        made = tiny.model(kind, seed)
        if made.can_generate():
            made.generation_config.eos_token_id = None
        return made
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = HEADED[kind]()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return made.eval()


def width(raw: Any) -> int:
    """Of the token embeddings."""
    return int(raw.get_input_embeddings().weight.shape[1])


def rows(raw: Any, seed: int = 1) -> Tensor:
    """A prompt that matters, [ROWS, width]."""
    return torch.randn(ROWS, width(raw), generator=torch.Generator().manual_seed(seed))


# ---- text -----------------------------------------------------------------------------------------------------------


def ids(text: str = TEXTS[2]) -> list[int]:
    """Token ids with special tokens."""
    return list(tiny.tokenizer()(text)["input_ids"])


def batch(side: str = "left", texts: tuple[str, ...] = TEXTS) -> dict[str, Tensor]:
    """A padded batch, as a tokenizer makes it."""
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = side
    return dict(tokenizer(list(texts), return_tensors="pt", padding=True, return_token_type_ids=False))


def one(text: str = TEXTS[2]) -> dict[str, Tensor]:
    """A single text."""
    return batch(texts=(text,))


# ---- the bare model, by hand ----------------------------------------------------------------------------------------


@torch.no_grad()
def alone(raw: Any, text: list[int], prompt: Tensor, **more: Any) -> Any:
    """The output of the bare model on [prompt; embeddings of one text]."""
    embedded = raw.get_input_embeddings()(torch.tensor([text]))
    return raw(inputs_embeds=torch.cat([prompt[None], embedded], dim=1), **more)


@torch.no_grad()
def greedy(
    raw: Any, text: list[int], prompt: Tensor, steps: int = 8, rule: Callable[[Tensor, Tensor], Tensor] | None = None
) -> list[int]:
    """Greedy decoding by the bare model, the whole sequence anew for each token; `rule(ids, scores)` sees the text."""
    written: list[int] = []
    for _ in range(steps):
        if raw.config.is_encoder_decoder:
            seen = torch.tensor([[raw.config.decoder_start_token_id, *written]])
            scores = alone(raw, text, prompt, decoder_input_ids=seen).logits[:, -1]
        else:
            seen = torch.tensor([[*text, *written]])
            scores = alone(raw, [*text, *written], prompt).logits[:, -1]
        if rule is not None:
            scores = rule(seen, scores)
        written.append(int(scores.argmax()))
    return written


# ---- libraries ------------------------------------------------------------------------------------------------------


@dataclass
class Host:
    """A model with a prompt: what a user calls, and what is trained."""

    model: Any

    @property
    def trained(self) -> list[Tensor]:
        """Tensors that an optimiser would be given."""
        return [value for value in self.model.parameters() if value.requires_grad]

    def text(self, values: Tensor, given: dict[str, Tensor]) -> Tensor:
        """Values at the text's columns, whether or not the library returns those of the prompt too."""
        return values[:, values.shape[1] - given["attention_mask"].shape[1] :]

    def written(self, given: dict[str, Tensor], **options: Any) -> list[list[int]]:
        """What `generate` adds to each row."""
        found = self.model.generate(**given, max_new_tokens=8, **{"do_sample": False, **options})
        found = found if isinstance(found, Tensor) else found.sequences
        begin = 1 if self.model.config.is_encoder_decoder else given["input_ids"].shape[1]
        return [row[begin:] for row in found.tolist()]


class Ours:
    """promptuary."""

    name = "promptuary"
    by_name = "prompt_names"
    first = "a"

    def tuned(self, base: Any, prompt: Tensor, placement: str = "front") -> Tuned:
        """Prompt tuning with these rows on a model."""
        settings = {"num_virtual_tokens": len(prompt), "placement": placement}
        made = promptuary.adapt(base, tiny.tokenizer(), "prompt_tuning", **settings)
        made.restore({"method.rows": prompt})
        return made

    @contextmanager
    def on(self, base: Any, prompt: Tensor, *others: Tensor, train: bool = False) -> Iterator[Host]:
        """The model with a prompt, or with several that rows call "a", "b", ..."""
        made = [self.tuned(base, each) for each in (prompt, *others)]
        named = dict(zip("abcdef", made, strict=False)) if others else {"": made[0]}
        try:
            with promptuary.attach(named, base, train=train):
                yield Host(base)
        finally:
            for each in made:
                each.backbone.release()

    def save(self, base: Any, prompt: Tensor, folder: Path) -> Path:
        """Write the prompt; the file that holds its numbers is returned."""
        checkpoint.save_prompt(self.tuned(base, prompt), folder)
        return folder / "prompt.safetensors"

    @contextmanager
    def load(self, base: Any, folder: Path, train: bool = False) -> Iterator[Host]:
        """The model with a prompt from a folder."""
        made = promptuary.load_prompt(folder, model=base, tokenizer=tiny.tokenizer())
        with made.attach(train=train):
            yield Host(base)

    def at_once(self, base: Any, prompts: list[Tensor], work: Callable[[int, Host], None]) -> None:
        """Two threads choose a prompt each, then both work."""
        made = [self.tuned(base, each) for each in prompts]
        _threads(lambda number: made[number].attach(base), lambda number: work(number, Host(base)))

    def without(self, base: Any, prompt: Tensor, given: dict[str, Tensor]) -> Any:
        """What the model returns with its prompt switched off."""
        with self.on(base, prompt) as host:
            host.model(**given)
        return base(**given)

    @contextmanager
    def training(self, base: Any, method: str) -> Iterator[tuple[Any, Callable[[], Tensor]]]:
        """A model for transformers' Trainer, and its prompt as it would be deployed."""
        name, settings = {
            "rows": ("prompt_tuning", {"num_virtual_tokens": ROWS}),
            "reparameterised rows": ("lamp", {"length": ROWS, "rank": 2, "pool": 1}),
            "reparameterised prefix": (
                "prefix",
                {"num_virtual_tokens": ROWS, "reparameterize": True, "encoder_hidden_size": 16},
            ),
        }[method]
        made = promptuary.adapt(base, tiny.tokenizer(), name, **settings)
        assert made.method is not None
        with made.attach(train=True):
            yield base, lambda: torch.cat([part.flatten() for part in _parts(made)])


def _parts(made: Tuned) -> list[Tensor]:
    assert made.method is not None
    prompt = made.method.fold()
    return [part for part in (prompt.rows, prompt.kv) if part is not None]


class Peft:
    """PEFT."""

    name = "peft"
    by_name = "adapter_names"
    first = "default"

    TASKS: Mapping[str, str] = {
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }

    def config(self, base: Any, prompt: Tensor, **more: Any) -> Any:
        """The configuration that its documentation gives for such a model."""
        import peft

        ending = next((task for name, task in self.TASKS.items() if type(base).__name__.endswith(name)), None)
        writes = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
        known = ending or (writes if base.can_generate() else "FEATURE_EXTRACTION")
        return peft.PromptTuningConfig(task_type=known, num_virtual_tokens=len(prompt), **more)

    def wrapped(self, base: Any, prompt: Tensor) -> Any:
        """The model with a prompt."""
        import peft

        made = peft.get_peft_model(base, self.config(base, prompt))
        self.fill(made, "default", prompt)
        return made.eval()

    @staticmethod
    def fill(made: Any, name: str, prompt: Tensor) -> None:
        """Put rows in; an encoder-decoder has room for twice as many."""
        with torch.no_grad():
            made.prompt_encoder[name].embedding.weight[: len(prompt)] = prompt

    @contextmanager
    def on(self, base: Any, prompt: Tensor, *others: Tensor, train: bool = False) -> Iterator[Host]:
        """The model with a prompt, or with several that rows call "default", "b", ..."""
        made = self.wrapped(base, prompt)
        for name, each in zip("bcdef", others, strict=False):
            made.add_adapter(name, self.config(base, each))
            self.fill(made, name, each)
        yield Host(made)

    def save(self, base: Any, prompt: Tensor, folder: Path) -> Path:
        """Write the prompt; the file that holds its numbers is returned."""
        self.wrapped(base, prompt).save_pretrained(folder)
        return folder / "adapter_model.safetensors"

    @contextmanager
    def load(self, base: Any, folder: Path, train: bool = False) -> Iterator[Host]:
        """The model with a prompt from a folder."""
        import peft

        yield Host(peft.PeftModel.from_pretrained(base, folder, is_trainable=train).eval())

    def at_once(self, base: Any, prompts: list[Tensor], work: Callable[[int, Host], None]) -> None:
        """Two threads choose a prompt each, then both work."""
        with self.on(base, *prompts) as host:
            names = (self.first, "b")
            _threads(lambda number: host.model.set_adapter(names[number]), lambda number: work(number, host))

    def without(self, base: Any, prompt: Tensor, given: dict[str, Tensor]) -> Any:
        """What the model returns with its prompt switched off."""
        with self.on(base, prompt) as host, host.model.disable_adapter():
            return host.model(**given)

    @contextmanager
    def training(self, base: Any, method: str) -> Iterator[tuple[Any, Callable[[], Tensor]]]:
        """A model for transformers' Trainer, and its prompt as it would be deployed."""
        import peft

        common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": ROWS}
        config = {
            "rows": lambda: peft.PromptTuningConfig(**common),
            "reparameterised rows": lambda: peft.PromptEncoderConfig(**common, encoder_hidden_size=16),
            "reparameterised prefix": lambda: peft.PrefixTuningConfig(
                **common, encoder_hidden_size=16, prefix_projection=True
            ),
        }[method]()
        torch.manual_seed(1)
        made = peft.get_peft_model(base, config)
        yield made, lambda: made.get_prompt_embedding_to_save("default")


def _threads(choose: Callable[[int], Any], work: Callable[[int], None]) -> None:
    """Both choose before either works, one after the other; an error in one is raised here."""
    barrier, turn, failed = threading.Barrier(2, timeout=60), threading.Lock(), list[Exception]()

    def run(number: int) -> None:
        try:
            chosen = choose(number)
            with chosen if isinstance(chosen, AbstractContextManager) else nullcontext():
                barrier.wait()
                with turn:
                    work(number)
                barrier.wait()
        except Exception as error:  # whatever another library raises is a result
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


Library = Peft | Ours
LIBRARIES: Mapping[str, Library] = {"peft": Peft(), "promptuary": Ours()}
