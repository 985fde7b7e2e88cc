"""A model behind an OpenAI-compatible endpoint as a backbone: reads prompts of words, scores label words and writes.

Knows no method, task or data set. Its texts are bytes here, since only the endpoint knows the real tokens; nothing of
the model is on this machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, ClassVar, NoReturn

import torch
import transformers
from jaxtyping import Float
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from promptuary.backbones.base import Backbone, BackboneConfig, Prompts
from promptuary.errors import ConfigError, SiteError
from promptuary.speakers.answers import Reader, bare
from promptuary.speakers.asked import Asked
from promptuary.speakers.base import Message, SpeakerConfig, user
from promptuary.speakers.budget import Ledger
from promptuary.speakers.opening import open_speaker
from promptuary.types import Batch, Candidates, Encoded, Piece, Prompt, Shape

PLACE = "prompt"
"""The slot where the words of a prompt stand."""

BYTES_PER_TOKEN = 4
"""What `data.max_length` counts as a token: English text has about four bytes in one; our choice."""

ANSWER_TOKENS = 16
"""Most tokens of an answer that is read as a label; our choice."""

FAR = -20.0
"""Score of a label that was not the answer, where the endpoint tells no probabilities; our choice."""


class Letters(transformers.PreTrainedModel):
    """What stands for the model on this machine: a table of the 256 bytes, which nobody runs."""

    config_class = transformers.PretrainedConfig

    def __init__(self, config: Any) -> None:
        """Make the table, all zero."""
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.zeros_(self.table.weight)

    def get_input_embeddings(self) -> nn.Module:
        """The table."""
        return self.table

    def get_output_embeddings(self) -> None:
        """There is no head."""
        return None

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Nothing runs here.

        Raises:
            SiteError: always.
        """
        raise SiteError("a remote model runs behind its endpoint and gives no states; use a model on this machine")


def letters() -> Letters:
    """The table."""
    config = transformers.PretrainedConfig(
        vocab_size=len(byte_tokenizer()), hidden_size=1, num_hidden_layers=1, num_attention_heads=1
    )
    return Letters(config)


def byte_tokenizer() -> Any:
    """A fast tokenizer whose tokens are the 256 bytes, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|end|>", clean_up_tokenization_spaces=False
    )


class Remote(Backbone):
    """A model that is asked over the network; it only answers, so nothing is differentiable."""

    name = "remote"
    loader: ClassVar[Any] = None
    answer_at = "end"
    abilities = frozenset({"words", "generate"})
    pooling = "answer"
    sites = frozenset({"text"})
    differentiable = False
    words_at_head = False
    speaker: Asked
    reader: Reader

    @classmethod
    def load(cls, config: BackboneConfig) -> Backbone:
        """Prepare to ask; nothing is sent yet.

        Raises:
            MissingExtra: the openai package is not installed.
            ConfigError: the environment holds something that is no key.
        """
        made = cls(letters(), byte_tokenizer(), config)
        made.talk_to(open_speaker(made.settings, "task", Ledger()))
        return made

    @property
    def settings(self) -> SpeakerConfig:
        """How it is asked."""
        if self.config.endpoint is None:
            raise ConfigError("backbone.endpoint: a remote model needs the address of its endpoint")
        return SpeakerConfig(model=self.config.model, **self.config.endpoint.model_dump())

    def talk_to(self, speaker: Asked) -> None:
        """Ask through this one from now on, such as one on the ledger of a run; `reader` counts its answers anew."""
        self.speaker, self.reader = speaker, Reader()

    def ask_through(self, opened: Callable[[SpeakerConfig, str], Any]) -> None:
        """On the ledger and the cache of a run."""
        self.talk_to(opened(self.settings, "task"))

    def release(self) -> Any:
        """Close connections and files besides; they open again when they are used."""
        self.speaker.close()
        return super().release()

    @cached_property
    def identity(self) -> dict[str, str]:
        """Name and address: nothing else of the model can be seen."""
        endpoint = self.config.endpoint
        where = "" if endpoint is None else str(endpoint.base_url)
        return {
            "architecture": f"remote {self.config.model}",
            "embedding": where,
            "vectors": where,
            "matrices": where,
            "tokenizer": "bytes",
        }

    def find_shape(self) -> Shape:
        """No widths that a prompt could have."""
        return Shape(1, hidden=1, vocabulary=self.wiring.vocabulary)

    @property
    def max_positions(self) -> None:
        """Only the endpoint knows."""
        return None

    def lacks(self, *sites: str) -> str:
        """A message that only words reach it."""
        return (
            f"the prompt uses {', '.join(sorted(sites))}, and only words reach {self.config.model} behind its "
            "endpoint; choose a method for prompts of words, or a model on this machine"
        )

    # ---- text to bytes -----------------------------------------------------------------------------------------------

    def encode(self, pieces: Sequence[Piece], max_length: int) -> Encoded:
        """A filled template as bytes, of which four count as one of `max_length`."""
        return self.text.encode(pieces, max_length * BYTES_PER_TOKEN)

    def spelt(self, ids: Tensor | Sequence[int]) -> str:
        """The text of bytes; a character that was cut in two is left out."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.replace("\ufffd", "")

    def conversations(self, batch: Batch, prompts: Prompts) -> list[tuple[Message, ...]]:
        """What is asked for each row: the words of a prompt that stand before everything are the system message.

        Anywhere else they stand in the question.

        Raises:
            SiteError: a prompt that is no words.
        """
        several = [prompts] if isinstance(prompts, Prompt) else list(prompts)
        for prompt in several:
            missing = self.missing(prompt.sites)
            if missing:
                raise SiteError(self.lacks(*missing))
        which = [0] * len(batch) if batch.prompt_index is None else batch.prompt_index.tolist()
        columns = batch.slots[PLACE].tolist() if PLACE in batch.slots else [0] * len(batch)
        real = batch.attention_mask.bool()
        asked = []
        for row, (number, column) in enumerate(zip(which, columns, strict=True)):
            prompt, ids, kept = several[number], batch.input_ids[row], real[row]
            before, behind = self.spelt(ids[:column][kept[:column]]), self.spelt(ids[column:][kept[column:]])
            words = (prompt.text or "").strip()
            if not words:
                question, system = before + behind, None
            elif not before.strip() and behind.strip():
                question, system = behind, words
            else:
                inside = words if prompt.ids is None else self.spelt(prompt.ids)
                question, system = before + inside + behind, None
            asked.append(tuple(user(question.strip(), system)))
        return asked

    # ---- what it does ------------------------------------------------------------------------------------------------

    def score(self, batch: Batch, prompts: Prompts, candidates: Candidates) -> Float[Tensor, "b c"]:
        """Log-probabilities of the label words where the endpoint tells them, else 0 for the answer, -20 for the rest.

        The answer is the label that is written, or that alone stands in what is written. Where there is none, all
        labels score -inf, so that the row is wrong, and `reader` counts it.
        """
        ids = candidates.ids.expand(len(batch), -1, -1).tolist()
        mask = candidates.mask.expand(len(batch), -1, -1)
        exists = mask.any(-1)
        real = mask.tolist()
        asked = self.conversations(batch, prompts)
        replies = self._each(asked, lambda one: self.speaker.weighed(one, max_tokens=ANSWER_TOKENS))
        scores = []
        for reply, own, kept in zip(replies, ids, real, strict=True):
            words = [
                self.spelt([token for token, is_real in zip(tokens, which, strict=True) if is_real]).strip()
                for tokens, which in zip(own, kept, strict=True)
            ]
            place = self.reader.label(None if reply is None else reply.text, words)
            if place is None:
                self.speaker.account.note("unparsed")
                scores.append([-math.inf] * len(words))
            else:
                assert reply is not None
                scores.append(label_scores(place, words, reply.tops))
        found = torch.tensor(scores, dtype=torch.float32, device=batch.input_ids.device)
        return found.masked_fill(~exists.to(found.device), -torch.inf)

    def generate(self, batch: Batch, prompts: Prompts, *, max_new_tokens: int, **options: Any) -> list[list[int]]:
        """Bytes of the written answers; nothing for an answer that was empty or refused.

        Raises:
            SiteError: an option other than `do_sample`, `temperature` and `top_p`.
        """
        unknown = sorted(options.keys() - {"do_sample", "temperature", "top_p"})
        if unknown:
            raise SiteError(f"an endpoint has no {unknown[0]}; it takes do_sample, temperature and top_p")
        how: dict[str, Any] = {"temperature": 0.0}
        if options.get("do_sample"):
            how = {"temperature": float(options.get("temperature", 1.0)), "top_p": float(options.get("top_p", 1.0))}
        asked = self.conversations(batch, prompts)
        if how["temperature"] == 0:
            written = self._each(asked, lambda one: self.speaker.generate(one, max_tokens=max_new_tokens))
        else:
            written = [self.speaker.generate(one, max_tokens=max_new_tokens, **how) for one in asked]
        return [self._bytes(texts[0]) if texts else [] for texts in written]

    def _bytes(self, text: str) -> list[int]:
        coded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return list(coded.input_ids)

    def hidden(self, batch: Batch, prompts: Prompts) -> Float[Tensor, "b t h"]:
        """There are none.

        Raises:
            SiteError: always.
        """
        raise SiteError("a remote model gives no states; use task.reading: words, or a model on this machine")

    def _each(self, asked: Sequence[tuple[Message, ...]], ask: Callable[[tuple[Message, ...]], Any]) -> list[Any]:
        """What `ask` gives for each conversation, several on their way at once, equal ones once."""
        keys = [tuple((one["role"], one["content"]) for one in conversation) for conversation in asked]
        once = dict(zip(keys, asked, strict=True))
        with ThreadPoolExecutor(self.settings.parallel) as pool:
            waiting = {key: pool.submit(ask, conversation) for key, conversation in once.items()}
            try:
                found = {key: one.result() for key, one in waiting.items()}
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [found[key] for key in keys]


def label_scores(place: int, words: Sequence[str], tops: Sequence[tuple[str, float]]) -> list[float]:
    """A score for each label, highest for the one at `place`, which is the answer.

    Where the likeliest first tokens are told, each label gets the log of the probability of those tokens that begin it
    and no other label; labels that none of them begins get the least of them. If that does not put the answer first, as
    when it stands at the end of a sentence, only the answer itself counts.
    """
    known = [bare(word) for word in words]
    mass = [0.0] * len(words)
    for token, value in tops:
        begins = [number for number, word in enumerate(known) if bare(token) and word.startswith(bare(token))]
        if len(begins) == 1:
            mass[begins[0]] += math.exp(value)
    if mass[place] > 0 and all(one < mass[place] for number, one in enumerate(mass) if number != place):
        least = min(value for _, value in tops)
        floor = max(FAR, least)
        return [math.log(one) if one > 0 else floor for one in mass]
    return [0.0 if number == place else FAR for number in range(len(words))]
