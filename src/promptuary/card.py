"""The card of a prompt: a README with metadata in the hub's format, from the facts in `prompt.json`.

Knows no folder, no network, and no method, family or task by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from promptuary import asking
from promptuary.errors import FileFormatError
from promptuary.public import is_local, public_name
from promptuary.tuned import Tuned

PLACE = "this/folder"
"""Stands for the prompt's own place in the snippet, until it has a name on the hub."""

HUB_METRICS = {
    "macro_f1": "f1",
    "token_f1": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "mean_squared_error": "mse",
}
"""Our name of a metric -> the hub's, where they differ."""


def source(data: Mapping[str, Any]) -> dict[str, Any]:
    """What `prompt.json` tells of the data: `source`, whether that is a hub name (`hub`), and the rest as it came."""
    name = str(data["source"])
    return {**data, "source": public_name(name), "hub": name != "demo" and not is_local(name)}


def write(tuned: Tuned, facts: Mapping[str, Any]) -> str:
    """The whole card.

    Args:
        tuned: with a method.
        facts: what `prompt.json` will hold.
    """
    method = tuned.method
    assert method is not None
    base, data = str(facts["backbone"]["model"]), facts.get("data") or {}
    name = f"{method.title} prompt for {public_name(base)}"
    front = ModelCardData(
        library_name="promptuary",
        base_model=None if is_local(base) else base,
        base_model_relation=None if is_local(base) else "adapter",
        pipeline_tag=tuned.task.pipeline if tuned.has_task else None,
        tags=["prompt", method.name],
        datasets=[data["source"]] if data.get("hub") else None,
        model_name=name,
        eval_results=_results(tuned, facts["metrics"], data) or None,
    )
    offset = f" and an offset for the first {tuned.offset_rows} positions of the text" if tuned.offset_rows else ""
    published = method.paper != "none"
    known = "It follows the published description.\n" if published else ""
    if method.reconstructed:
        known = (
            "It was rebuilt from partial sources; its card in the documentation says what is known and what is our "
            "choice.\n"
        )
    scores = "\n".join(f"- {metric}: {value:.4f}" for metric, value in facts["metrics"].items())
    return f"""---
{_yaml(front)}
---

# {name}

{method.title}{f" ({method.paper})" if published else ""}, {_size(facts)},
{facts["added_tokens"]} added positions{offset}.
{known}The base model is unchanged and is not in this folder.
{_words(tuned, facts)}
## Use

```python
import promptuary

tuned = promptuary.load_prompt("{PLACE}")
{_use(tuned)}
```

{_task(tuned)}
## Training

{_training(facts, data)}
## Scores

{scores or "- none recorded"}

## Limits

{_limits(tuned, facts, base)}
Made with promptuary {facts["promptuary"]}.
"""


def for_hub(text: str, repo: str, *, license: str | None = None, language: Sequence[str] = ()) -> str:
    """A card with its name on the hub, and with what only its owner can say.

    Raises:
        FileFormatError: its metadata are not what the hub takes.
    """
    text = text.replace(f'load_prompt("{PLACE}")', f'load_prompt("{repo}")')
    try:
        card = ModelCard(text)
        given = {"license": license, "language": list(language) or None}
        for name, value in given.items():
            if value is not None:
                card.data[name] = value
        return f"---\n{_yaml(card.data)}\n---\n{card.text}"
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FileFormatError(f"the metadata of the card are not in the hub's format: {reason}") from None


def _yaml(front: Any) -> str:
    """The metadata; a name belongs to results and is left out without them."""
    if not front.eval_results:
        front.eval_results = front.model_name = None
    return str(front.to_yaml()).strip()


def _results(tuned: Tuned, metrics: Mapping[str, float], data: Mapping[str, Any]) -> list[EvalResult]:
    """Scores for `model-index`, which needs a task and a data set."""
    if not tuned.has_task or not data:
        return []
    found = []
    for name, value in metrics.items():
        split, _, metric = name.rpartition(" ")
        if math.isfinite(value):
            found.append(
                EvalResult(
                    task_type=tuned.task.pipeline,
                    dataset_type=data["source"] if data["hub"] else "custom",
                    dataset_name=data["source"],
                    dataset_config=data.get("subset"),
                    dataset_revision=data.get("revision"),
                    dataset_split=split or None,
                    metric_type=HUB_METRICS.get(metric, metric),
                    metric_name=name,
                    metric_value=value,
                )
            )
    return found


def _size(facts: Mapping[str, Any]) -> str:
    return "words" if facts.get("text") is not None else f"{facts['trainable_parameters']:,} trained numbers"


def _words(tuned: Tuned, facts: Mapping[str, Any]) -> str:
    """The text of a prompt of words, in a fence that is longer than any in it; or what writes it for each input."""
    if tuned.spoken is not None:
        return (
            f"\nA policy of {facts['trainable_parameters']:,} trained numbers writes {tuned.spoken.num_tokens} tokens "
            f"for each input, which stand at the template's `{{prompt}}`; its voice is "
            f"{public_name(tuned.spoken.model)}.\n"
        )
    text = facts.get("text")
    if text is None:
        return ""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    where = "wherever you put it"
    if tuned.has_task and asking.PLACE in tuned.task.template.slots:
        where = "at the template's `{prompt}`"
    elif tuned.has_task:
        where = (
            "right before the answer" if tuned.asking.words_at == "end" else "before everything, in a line of its own"
        )
    return f"\nThe prompt, which stands {where}:\n\n{fence}text\n{text}\n{fence}\n"


def _use(tuned: Tuned) -> str:
    if not tuned.has_task:
        return "with tuned.attach(model):\n    model.generate(...)"
    fields = tuned.task.template.fields
    known = '"image.jpg"' if tuned.task.config.image in fields else '"..."'
    example = known if len(fields) == 1 else "{" + ", ".join(f'"{field}": "..."' for field in fields) + "}"
    return f"tuned.predict([{example}])"


def _task(tuned: Tuned) -> str:
    if not tuned.has_task:
        return "This prompt carries no task: attach it to the model and run the model.\n"
    words = "".join(f"- `{word}`\n" for word in tuned.task.words)
    answers = f"\nAnswers:\n\n{words}" if words else ""
    return f"Template:\n\n```text\n{tuned.task.template.text}\n```\n{answers}"


def _training(facts: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    if not data:
        return "- data: not recorded\n"
    subset = f", {data['subset']}" if data.get("subset") else ""
    where = "" if data["hub"] else " (not on the hub)"
    rows = ", ".join(f"{count:,} {split}" for split, count in data.get("examples", {}).items())
    settings = "- settings: `method_config` in `prompt.json`\n"
    return f"- data: {data['source']}{subset}{where}\n" + (f"- rows: {rows}\n" if rows else "") + settings


def _limits(tuned: Tuned, facts: Mapping[str, Any], base: str) -> str:
    lines = ["It fits this base with this tokenizer only, and is refused on another; the base's own limits stay."]
    if tuned.text is not None:
        lines = ["It was made for this base; `load_prompt(..., model=, carry=True)` tries the words on another one."]
    if is_local(base):
        lines.append("The base has no name on the hub: load the prompt with `model=` and the place of your copy.")
    if tuned.has_task:
        lines.append(f"Texts are cut to {facts['max_length']} tokens.")
        lines.append("The scores hold for the data named above and were not measured on anything else.")
    if tuned.method is not None and tuned.method.depends:
        lines.append("The prompt depends on the input, so it has no static form for other tools.")
    return "".join(f"- {line}\n" for line in lines)
