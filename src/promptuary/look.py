"""A look inside a prompt: norms, nearest tokens, the offset table, a method's insights; as numbers and as a picture.

Knows no method, family or command line; reads the folded prompt, where there is one, and the base's vocabulary.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from promptuary.errors import ConfigError, NotFoldable, require
from promptuary.tuned import Tuned
from promptuary.types import Offset, Prompt

WIDE = 16
"""Columns above which only the largest entries of a row are told."""

FIRST = 10
"""Rows of an offset table whose norms are told."""

CHUNK = 8192
"""Tokens that are compared at once, so that a large vocabulary is never copied as a whole."""

ACROSS = 3
"""Panels of a picture beside each other."""

PICTURES = (".png", ".svg", ".pdf")


class Vocabulary(Protocol):
    """What is asked of a base."""

    def common(self, limit: int) -> Int[Tensor, " n"]:
        """Ids of up to `limit` ordinary tokens."""
        ...

    def embed(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Their embeddings, float32."""
        ...


def nearest_tokens(
    rows: Float[Tensor, "p d"], vocabulary: Vocabulary, limit: int, top: int
) -> list[list[tuple[int, float]]]:
    """For each row the ids of the ordinary tokens with the largest cosine, and the cosines, largest first.

    Args:
        rows: prompt rows.
        vocabulary: of the base.
        limit: size of the vocabulary.
        top: how many of them.
    """
    ids = vocabulary.common(limit)
    wanted = torch.nn.functional.normalize(rows.float().cpu(), dim=-1)
    values, found = wanted.new_empty(len(rows), 0), ids.new_empty(len(rows), 0)
    for part in ids.split(CHUNK):
        cosines = wanted @ torch.nn.functional.normalize(vocabulary.embed(part), dim=-1).T
        values = torch.cat([values, cosines], dim=1)
        found = torch.cat([found, part.expand(len(rows), -1)], dim=1)
        values, order = values.topk(min(top, values.shape[1]), dim=1)
        found = found.gather(1, order)
    return [list(zip(f, v, strict=True)) for f, v in zip(found.tolist(), values.tolist(), strict=True)]


def describe(tuned: Tuned, top: int = 5) -> dict[str, Any]:
    """A prompt as plain numbers; of one that depends on the input only what its method has to tell.

    Args:
        tuned: with a method.
        top: nearest tokens of each row, and largest entries of a wide insight.

    Raises:
        NotFoldable: there is no prompt.
    """
    prompt = _folded(tuned)
    method, tokenizer = tuned.method, tuned.backbone.tokenizer
    assert method is not None
    rows = []
    among = _among_words(prompt)
    if among is not None:
        near = nearest_tokens(among, tuned.backbone.vocabulary, len(tokenizer), top)
        for number, (row, tokens) in enumerate(zip(among, near, strict=True)):
            named = [{"token": _spelt(tokenizer, token), "id": token, "cosine": round(cos, 4)} for token, cos in tokens]
            rows.append({"row": number, "norm": round(float(row.norm()), 4), "nearest": named})
    return {
        "method": method.name,
        "title": method.title,
        "paper": method.paper,
        "reconstructed": method.reconstructed,
        "depends_on_input": method.depends,
        "base": tuned.backbone.config.model,
        "trainable_parameters": tuned.trainable_parameters,
        "added_tokens": tuned.added_tokens,
        "text": prompt.text,
        "rows": rows,
        "offset": None if prompt.offset is None else _offset(prompt.offset),
        "insight": {name: _told(value.float().cpu(), top) for name, value in method.insight().items()},
    }


def history(folder: Path) -> list[dict[str, Any]]:
    """How a run came to the words of its prompt: each text that was validated, in order, where it was another one.

    Args:
        folder: of a run, or of the prompt in it.

    Returns:
        `step`, `calls` (texts that were tried on the training examples until then), the validation scores, `text`, and
        `changed`: the words that went and came. Empty for a prompt that is alone, or is not words.
    """
    file = next((one for one in (folder / "metrics.jsonl", folder.parent / "metrics.jsonl") if one.is_file()), None)
    found = list[dict[str, Any]]()
    for line in [] if file is None else file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("split") != "validation" or "text" not in row or (found and found[-1]["text"] == row["text"]):
            continue
        before = found[-1]["text"].split() if found else []
        changed = [one for one in difflib.ndiff(before, row["text"].split()) if one[:1] in "-+"] if found else []
        known = {name: value for name, value in row.items() if name not in ("split", "time")}
        found.append({**known, "changed": changed})
    return found


def check_picture(path: Path) -> None:
    """Refuse a picture that could not be drawn, before anything is loaded.

    Raises:
        ConfigError: an unknown file ending.
        MissingExtra: matplotlib is not installed.
    """
    if path.suffix.lower() not in PICTURES:
        raise ConfigError(f'a picture ends in {", ".join(PICTURES)}, got "{path.name}"')
    require("matplotlib", extra="plots")


def picture(tuned: Tuned, path: str | Path) -> Path:
    """Draw norms of the rows, cosines between them, the offset table's norms and every insight.

    Args:
        tuned: with a method.
        path: the file; its ending says the format.

    Raises:
        ConfigError: an unknown file ending, or it cannot be written.
        MissingExtra: matplotlib is not installed.
        NotFoldable: there is no prompt, or it depends on the input and its method has nothing to show.
    """
    path = Path(path)
    check_picture(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    prompt, method = _folded(tuned), tuned.method
    assert method is not None
    panels: list[tuple[str, Tensor]] = []
    rows = _among_words(prompt)
    if rows is not None:
        rows = rows.detach().float().cpu()
        unit = torch.nn.functional.normalize(rows, dim=-1)
        panels += [("norm of each row", rows.norm(dim=-1)), ("cosine between rows", unit @ unit.T)]
    if prompt.offset is not None:
        panels.append(
            ("norm of the offset at each position", prompt.offset.table().detach().float().cpu().norm(dim=-1))
        )
    panels += [(name, value.float().cpu()) for name, value in method.insight().items() if value.dim() <= 2]
    if not panels:
        why = "depends on the input" if method.text is None else "is words"
        raise NotFoldable(f"the prompt of {method.name} {why}, and its method has nothing to draw")
    lines = -(-len(panels) // ACROSS)
    figure = Figure(figsize=(4.6 * min(len(panels), ACROSS), 3.4 * lines), layout="constrained")
    for number, (name, value) in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, min(len(panels), ACROSS), number)
        axes.set_title(name, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if value.dim() < 2:
            axes.bar(range(value.numel()), value.reshape(-1).tolist(), color="#4c72b0", width=0.9)
            continue
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        drawn = axes.imshow(value.tolist(), aspect="auto", cmap="viridis", interpolation="nearest")
        figure.colorbar(drawn, ax=axes)
    figure.suptitle(f"{method.title} on {tuned.backbone.config.model}", fontsize=11)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    return path


def _folded(tuned: Tuned) -> Prompt:
    if tuned.method is None:
        raise NotFoldable("there is no prompt to look at: this is the frozen model alone")
    if tuned.method.depends:
        return Prompt()
    with torch.no_grad():
        return tuned.method.fold()


def _among_words(prompt: Prompt) -> Float[Tensor, "p d"] | None:
    """The rows that stand among token embeddings: of a context those of the first layer, all sets and classes."""
    if prompt.rows is not None:
        return prompt.rows[0]
    return None if prompt.context is None else prompt.context[:, :, 0].flatten(0, 2)


def _spelt(tokenizer: Any, token: int) -> str:
    """A token as a person would write it; its own name if that is blank."""
    return str(tokenizer.decode([token])).strip() or str(tokenizer.convert_ids_to_tokens(token))


def _offset(offset: Offset) -> dict[str, Any]:
    norms = offset.table().detach().float().norm(dim=-1)
    return {
        "positions": len(norms),
        "rank": int(offset.left.shape[1]),
        "norms": _rounded(norms[:FIRST]),
        "largest": round(float(norms.max()), 4),
    }


def _told(value: Tensor, top: int) -> dict[str, Any]:
    """All values where they are few, else the largest of each row."""
    shape = list(value.shape)
    if value.dim() < 2 or (value.dim() == 2 and shape[1] <= WIDE):
        return {"shape": shape, "values": _rounded(value.reshape(-1) if value.dim() == 0 else value)}
    flat = value.reshape(-1, shape[-1])
    values, places = flat.topk(min(top, shape[-1]), dim=-1)
    return {
        "shape": shape,
        "largest": [
            [{"position": at, "value": round(v, 4)} for at, v in zip(row, entries, strict=True)]
            for row, entries in zip(places.tolist(), values.tolist(), strict=True)
        ],
    }


def _rounded(value: Tensor) -> Any:
    """Nested lists with four digits."""
    if value.dim() > 1:
        return [_rounded(part) for part in value]
    return [round(number, 4) for number in value.tolist()]
