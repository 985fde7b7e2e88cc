"""A prompt as vLLM's `prompt_embeds` input: a folder from which a client embeds whole requests, without model or GPU.

Knows no method and no architecture, and never imports vllm; the base's embeddings are copied as its module gives them.
"""

from __future__ import annotations

import base64
import io
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from jaxtyping import Float
from torch import Tensor

import promptuary
from promptuary import files, registry
from promptuary.backbones.load import tokenizer_hash
from promptuary.backbones.text import TextCoder
from promptuary.errors import ConfigError, DataError, FileFormatError, FingerprintError, NotFoldable
from promptuary.tasks.template import Template
from promptuary.types import Prediction

if TYPE_CHECKING:
    from promptuary.tasks.base import Task
    from promptuary.tuned import Tuned

FORMAT, VERSION = "promptuary-vllm", 1
FACTS, ROWS, TABLE, REQUESTS = "client.json", "rows.safetensors", "embedding.safetensors", "requests.safetensors"

CHUNK = 8192
"""Tokens that are embedded at once while the table is copied."""

Item = str | Mapping[str, Any] | Sequence[int]
"""A text, the fields of an example, or token ids that the caller made (such as by a chat template)."""


@dataclass(frozen=True)
class _Parts:
    """What a request is made of. `rows` [p, d] and `offset` [m, d] in float32, `table` [v, d] as the base holds it."""

    facts: Mapping[str, Any]
    tokenizer: Any
    task: Task | None
    table: Float[Tensor, "v d"]
    rows: Float[Tensor, "p d"]
    offset: Float[Tensor, "m d"]


class PromptEmbedder:
    """A client's side of a served prompt: texts to tensors for vLLM, and vLLM's answers to predictions.

    The embedding table is mapped into memory and read where a text needs it; processes on one machine share it.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open what `promptuary export --to vllm` wrote.

        Args:
            folder: the export. No file outside it is read, and nothing in it is run.

        Raises:
            FileFormatError: missing, damaged or of an unknown version.
            FingerprintError: the tokenizer in it is not the one of the export.
        """
        import transformers

        path = Path(folder)
        facts = _facts(path)
        parts = files.read_tensors(path / ROWS, facts["sha256"][ROWS])
        table = _mapped(path / TABLE)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        if tokenizer_hash(tokenizer) != facts["tokenizer"]:
            raise FingerprintError(f"{path} holds another tokenizer than the prompt was exported with; export it again")
        if list(table.shape) != facts["table"] or str(table.dtype) != f"torch.{facts['dtype']}":
            raise FileFormatError(f"{path / TABLE} is not the table that {FACTS} describes; export it again")
        self._parts = _Parts(facts, tokenizer, _task(facts), table, parts["rows"], parts["offset"])

    def embeds(self, item: Item) -> Float[Tensor, "q d"]:
        """The whole request as embeddings, prompt and text, in the base's dtype.

        Args:
            item: a text, the fields of an example, or token ids.

        Raises:
            DataError: a field is missing, nothing is there to embed, or the text is longer than the table allows.
            ConfigError: one text was given for a template with several fields.
        """
        return _embeds(self._parts, item)

    def request(self, item: Item) -> dict[str, Tensor]:
        """What `vllm.LLM.generate` takes."""
        return {"prompt_embeds": self.embeds(item)}

    def body(self, item: Item) -> str:
        """What the Completions endpoint takes as `prompt_embeds`: base64 of `torch.save`."""
        stream = io.BytesIO()
        torch.save(self.embeds(item), stream)
        return base64.b64encode(stream.getvalue()).decode("ascii")

    @property
    def sampling(self) -> dict[str, Any]:
        """Sampling parameters that the task asks for: `SamplingParams(**client.sampling)`; empty without a task."""
        return dict(self._parts.facts["sampling"])

    def read(self, answer: str | Mapping[int, float]) -> Prediction:
        """What vLLM gave back, as an answer of the task.

        Args:
            answer: the written text; for a task that scores label words, the log-probabilities of the first written
                token by token id, with those of all label words (`--logprobs-mode processed_logprobs`).

        Raises:
            ConfigError: the prompt has no task, or the answer is of the wrong kind for it.
            DataError: the log-probability of a label word is missing.
        """
        task, words = self._parts.task, self._parts.facts["word_ids"]
        if task is None:
            raise ConfigError("this prompt has no task, so there is nothing to read an answer as; use the text itself")
        if isinstance(answer, str):
            if words:
                raise ConfigError("this task scores label words; give the log-probabilities by token id, not a text")
            return task.decode_text(answer)
        if not words:
            raise ConfigError("this task writes its answer; give the text")
        missing = [word for word, token in zip(task.words, words, strict=True) if token not in answer]
        if missing:
            raise DataError(
                f'there is no log-probability of the label word "{missing[0]}"; send client.sampling and run vLLM '
                "with --logprobs-mode processed_logprobs"
            )
        return task.decode([float(answer[token]) for token in words], {})


def write(tuned: Tuned, folder: Path, examples: Sequence[str | Mapping[str, Any]] = ()) -> Path:
    """Write a folder for clients of a vLLM server.

    Takes about three times the size of the embedding table in memory while it writes.

    Args:
        tuned: a static prompt on a decoder-only base.
        folder: replaced as a whole if it exists.
        examples: requests that are embedded now, into `requests.safetensors`: "000000" [q, d] and so on.

    Raises:
        NotFoldable: vLLM cannot serve this prompt; the message says why and what can.
        DataError: an example lacks a field; the message names its row.
    """
    prompt = _servable(tuned)
    backbone, width = tuned.backbone, tuned.backbone.shape.width
    with torch.no_grad():
        empty = torch.zeros(0, width)
        rows = empty if prompt.rows is None else prompt.rows[0].detach().float().cpu()
        offset = empty if prompt.offset is None else prompt.offset.table().detach().float().cpu()
        # the module's own answer to every id: what a model scales inside its embedding (Gemma) is in the table
        ids = torch.arange(backbone.table.weight.shape[0], device=backbone.device)
        table = torch.cat([backbone.table(part).cpu() for part in ids.split(CHUNK)])
    task = {**tuned.task.settled().model_dump(mode="json"), "name": tuned.task.name} if tuned.has_task else None
    contents = {ROWS: files.tensor_bytes({"rows": rows, "offset": offset}), **_tokenizer_files(backbone.tokenizer)}
    contents[TABLE] = files.tensor_bytes({"table": table})
    word_ids = [ids[0] for ids in _word_ids(tuned)]
    facts: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "promptuary": promptuary.__version__,
        "method": None if tuned.method is None else tuned.method.name,
        "base": backbone.config.model,
        "identity": backbone.identity,
        "tokenizer": tokenizer_hash(backbone.tokenizer),
        "dtype": str(table.dtype).removeprefix("torch."),
        "table": list(table.shape),
        "placement": prompt.placement,
        "overflow": "zero" if prompt.offset is None else prompt.offset.overflow,
        "max_length": tuned.max_length,
        "task": task,
        "word_ids": word_ids,
        "sampling": _sampling(tuned, word_ids),
    }
    if examples:
        parts = _Parts(facts, backbone.tokenizer, _task(facts), table, rows, offset)
        contents[REQUESTS] = files.tensor_bytes({f"{n:06d}": _row(parts, item, n) for n, item in enumerate(examples)})
    facts["sha256"] = {name: files.digest(content) for name, content in contents.items()}
    files.write_folder(folder, {**contents, FACTS: files.to_json(facts)})
    return folder


# ---- what can be served ---------------------------------------------------------------------------------------------


def _servable(tuned: Tuned) -> Any:
    """The folded prompt, or the reason why vLLM cannot serve it."""
    if tuned.method is None:
        raise NotFoldable("there is no prompt to export: this is the frozen model alone")
    if tuned.method.own_scores:
        raise NotFoldable(f"a prompt of {tuned.method.name} reads answers by itself, and vLLM gives text only")
    if tuned.method.text is not None:
        raise NotFoldable(
            f"this prompt is words, which need no export: write {tuned.method.text!r} into the requests, where the "
            "template has its {prompt}"
        )
    if tuned.backbone.answer_at != "end":
        raise NotFoldable(
            f"vLLM takes prompt_embeds for decoder-only models, and this base is of the {tuned.backbone.name} family; "
            "use promptuary predict"
        )
    prompt = tuned.method.fold()
    if prompt.kv is not None:
        raise NotFoldable(
            "this prompt is keys and values of every layer, and vLLM takes embeddings at the input only; train "
            "prompt_tuning, lamp, dept or ept instead, or use promptuary predict"
        )
    if prompt.placement == "end":
        raise NotFoldable("rows behind the text are not exported; use placement front or after_bos")
    if not isinstance(prompt.placement, str):
        raise NotFoldable("rows at named slots of the template are not exported; use placement front or after_bos")
    if tuned.has_task and tuned.task.reading == "head":
        raise NotFoldable("this task reads a trained head, which vLLM does not have; use promptuary predict")
    if tuned.has_task and tuned.task.reading == "words":
        if not tuned.task.words:
            raise NotFoldable("each example brings its own answers, which vLLM cannot score; use promptuary predict")
        long = [word for word, ids in zip(tuned.task.words, _word_ids(tuned), strict=True) if len(ids) > 1]
        if long:
            raise NotFoldable(
                f'the label word "{long[0]}" has several tokens, and vLLM gives the log-probability of one after an '
                "embedded prompt; train with label words of one token, or use promptuary predict"
            )
    return prompt


def _word_ids(tuned: Tuned) -> list[list[int]]:
    """Token ids of the label words, in the order of the task's scores."""
    if not tuned.has_task or tuned.task.reading != "words":
        return []
    return [tuned.backbone.answer_ids(word, glue=tuned.task.template.glue) for word in tuned.task.words]


def _sampling(tuned: Tuned, word_ids: Sequence[int]) -> dict[str, Any]:
    if not tuned.has_task:
        return {}
    if word_ids:
        return {
            "temperature": 0.0,
            "max_tokens": 1,
            "logprobs": len(word_ids),
            "allowed_token_ids": sorted(word_ids),
        }
    return {"temperature": 0.0, "max_tokens": getattr(tuned.task.config, "max_new_tokens", 20)}


# ---- a request ------------------------------------------------------------------------------------------------------


def _embeds(parts: _Parts, item: Item) -> Float[Tensor, "q d"]:
    facts = parts.facts
    coder = TextCoder(parts.tokenizer, "end")
    ids = torch.tensor(_ids(parts, coder, item))
    if len(ids) == 0 or int(ids.min()) < 0 or int(ids.max()) >= len(parts.table):
        raise DataError(f"token ids should be 0 to {len(parts.table) - 1} and at least one, got {ids.tolist()[:5]}")
    limit, length = len(parts.offset), len(ids)
    # in the order of PromptedEmbedding: added in float32, cast once
    text = parts.table[ids].float()
    if limit:
        if length > limit and facts["overflow"] == "error":
            raise DataError(f"a text has {length} tokens but the offset table {limit} rows; shorten the text")
        if length > limit:
            rest = "no offset" if facts["overflow"] == "zero" else "the last row"
            warnings.warn(
                f"a text has {length} tokens but the offset table has {limit} rows; tokens beyond it get {rest}",
                stacklevel=3,
            )
        text[:limit] += parts.offset[:length]
        if facts["overflow"] == "clamp":
            text[limit:] += parts.offset[-1]
    first = int(facts["placement"] == "after_bos" and int(ids[0]) in coder.prefix[:1])
    return torch.cat([text[:first], parts.rows, text[first:]]).to(parts.table.dtype)


def _ids(parts: _Parts, coder: TextCoder, item: Item) -> list[int]:
    if not isinstance(item, str | Mapping):
        return [int(token) for token in item]
    template = Template("{text}") if parts.task is None else parts.task.template
    fields = template.fields
    if isinstance(item, str):
        if len(fields) != 1:
            raise ConfigError(f"this prompt reads the fields {', '.join(fields)}, not a single text; give a mapping")
        item = {fields[0]: item}
    return coder.encode(template.fill(item), parts.facts["max_length"]).ids


def _row(parts: _Parts, item: Item, number: int) -> Float[Tensor, "q d"]:
    try:
        return _embeds(parts, item)
    except DataError as error:
        raise DataError(f"example {number + 1}: {error}") from None


# ---- the folder -----------------------------------------------------------------------------------------------------


def _tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def _task(facts: Mapping[str, Any]) -> Task | None:
    if facts["task"] is None:
        return None
    found = registry.known("tasks", facts["task"]["name"])
    made: Task = found(found.Config.read(facts["task"], where="task"))
    return made


def _facts(path: Path) -> dict[str, Any]:
    facts = files.read_json(path / FACTS)
    if facts.get("format") != FORMAT or facts.get("version") != VERSION:
        raise FileFormatError(
            f"{path / FACTS} has format {facts.get('format')!r} version {facts.get('version')!r}, this release reads "
            f"{FORMAT} {VERSION}; export the prompt again"
        )
    kinds = {
        "tokenizer": str, "dtype": str, "table": list, "placement": str, "overflow": str, "max_length": int,
        "task": dict | None, "word_ids": list, "sampling": dict, "sha256": dict,
    }  # fmt: skip
    wrong = [name for name, kind in kinds.items() if name not in facts or not isinstance(facts[name], kind)]
    if not wrong and not isinstance(facts["sha256"].get(ROWS), str):
        wrong = [f"sha256.{ROWS}"]
    if wrong:
        raise FileFormatError(f"{path / FACTS} is incomplete: {', '.join(wrong)} missing or of the wrong kind")
    if ":" in str((facts["task"] or {}).get("name", "")):
        raise FileFormatError(f"{path / FACTS} names a module to import, which an export must not")
    return facts


def _mapped(path: Path) -> Tensor:
    """The table, read page by page as it is used."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            table: Tensor = file.get_tensor("table")
    except (OSError, safetensors.SafetensorError) as error:
        raise FileFormatError(f"{path} cannot be read: {error}; export the prompt again") from None
    return table
