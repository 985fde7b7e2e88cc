"""PEFT and promptuary in everyday situations, both run, both measured against the bare model by hand.

Knows no result: every row is what was observed by the command that is noted here.

    python benchmarks/correctness.py run      # situations -> results/correctness.jsonl
    python benchmarks/correctness.py page     # results/correctness.jsonl -> docs/comparison.md
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import sys
import tempfile
import warnings
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "results" / "correctness.jsonl", HERE.parent / "docs" / "comparison.md"

GROUPS = {
    "forward": "One forward pass",
    "generate": "generate()",
    "training": "Training",
    "files": "Files",
    "model": "The model that was used",
}

INTRODUCTION = """# Comparison with PEFT

PEFT is the library that most people use for soft prompts, and [our prompts go there and back](how-to/peft.md). This
page says where the two answer differently. Both ran, with the same prompt on the same tiny random models, in the
situations below; what is right was worked out on the bare model by hand, by putting the prompt's vectors in front of
the embeddings of one text. Random models show the mechanism; they say nothing about accuracy on real tasks, and the
size of a number has no meaning beyond "not zero".

- **right**: the same as by hand (logits and losses to {close:g}, tokens exactly).
- **wrong**: it ran without an error and gave something else; the numbers say how much.
- **error**: it did not run.

PEFT {peft} was used as its documentation says, with `PromptTuningConfig` unless a row says otherwise; transformers
{transformers}, torch {torch}. The script is `benchmarks/correctness.py`, the rows are in
`benchmarks/results/correctness.jsonl`, and this page is made from them. The situations were chosen by us, most of them
because something was known to go wrong; so the sums are no score. That we are right is also tested, situation by
situation, in `tests/robust/test_peers.py`.
"""

NOTES = """
## Notes

- **Padding.** PEFT makes `[prompt][padding][text]` and drops `position_ids`, so with padding on the left the distance
  between prompt and text depends on the longest text of the batch. There, pad on the right for `forward`, and generate
  one text at a time.
- **Classifiers on decoders** look for the last real token in `input_ids`, which they do not get with PEFT: they read
  the padding.
- **Reparameterised rows** are `P_TUNING` in PEFT and LAMP here; a reparameterised prefix is `PREFIX_TUNING` with
  `prefix_projection` there and prefix tuning with `reparameterize` here. PEFT saves the folded prompt alone, so a
  resumed run starts from something else.
- **Two threads**: both choose their prompt, then each generates in turn. In PEFT the choice (`set_adapter`) belongs to
  the model, here to the thread.
- **Encoder-decoders**: PEFT trains twice the rows; the second half is never read.
- **The first token of a text** counts in PEFT's loss of causal models and does not here, as in transformers without a
  prompt; both are taken as right. For answers to questions, a loss over the text alone and one over prompt and text
  with moved labels are both taken as right.
- PEFT's other kinds of prompts were compared only where a row says so.
"""


def rows() -> list[dict[str, Any]]:
    """Run every situation in both libraries."""
    import torch
    import transformers

    sys.path.insert(0, str(HERE))
    from libraries import LIBRARIES
    from situations import SITUATIONS

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    versions = {name: metadata.version(name) for name in ("peft", "transformers", "torch")}
    versions = {name: version.split("+")[0] for name, version in versions.items()}
    found = []
    for one in SITUATIONS:
        for kind in one.kinds:
            for name, library in LIBRARIES.items():
                row: dict[str, Any] = {"situation": one.name, "group": one.group, "model": kind, "library": name}
                try:
                    number = one.measure(library, kind)
                except Exception as error:  # whatever another library raises is the result
                    message = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
                    row |= {"outcome": "error", "number": None, "message": clean(message)}
                else:
                    outcome = "right" if number <= one.limit else "wrong"
                    row |= {"outcome": outcome, "number": shorter(number), "message": None}
                found.append({**row, "unit": one.unit, "limit": one.limit, "versions": versions})
                print(one.name, kind, name, row["outcome"], row["number"], file=sys.stderr)
    return found


def clean(message: str) -> str:
    """Without places of this machine, and not too long."""
    message = message.replace(tempfile.gettempdir(), "...")
    return message if len(message) <= 160 else message[:157].rstrip() + "..."


def shorter(number: float) -> float | None:
    """Three digits; what is rounding is 0; a difference between things of different shape has no size."""
    if not math.isfinite(number):
        return None
    return float(f"{number:.3g}") if number > 1e-5 else 0.0


def read(path: Path = ROWS) -> list[dict[str, Any]]:
    """The rows that are in the repository."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def page(found: list[dict[str, Any]]) -> str:
    """Markdown, from the rows alone."""
    names = ("peft", "promptuary")
    cells: dict[str, dict[tuple[str, str], list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in found:
        cells[row["group"]][row["situation"], row["library"]].append(row)
    versions, close = found[0]["versions"], max(row["limit"] for row in found)
    parts = [INTRODUCTION.format(close=close, **versions), "\n", summary(found, names)]
    for group, title in GROUPS.items():
        parts.append(f"\n## {title}\n\n| situation | PEFT {versions['peft']} | promptuary |\n|---|---|---|\n")
        for situation in dict.fromkeys(situation for situation, _ in cells[group]):
            said = " | ".join(cell(cells[group][situation, name]) for name in names)
            parts.append(f"| {situation} | {said} |\n")
    return "".join([*parts, NOTES])


def summary(found: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    """How often each was right."""
    lines = ["| situation x model | " + " | ".join(("PEFT", "promptuary")) + " |\n|---|---|---|\n"]
    for outcome in ("right", "wrong", "error"):
        counts = [sum(row["library"] == name and row["outcome"] == outcome for row in found) for name in names]
        lines.append(f"| {outcome} | {counts[0]} | {counts[1]} |\n")
    return "".join(lines)


def cell(found: list[dict[str, Any]]) -> str:
    """One library in one situation, over its models; models with the same outcome stand together."""
    said: dict[str, list[str]] = defaultdict(list)
    for row in found:
        if row["outcome"] == "right":
            said["right"].append(row["model"])
        elif row["outcome"] == "wrong":
            number = "" if row["number"] is None or row["unit"].startswith("accepted") else f" {row['number']:g}"
            said[f"**wrong**, {row['unit']}"].append(row["model"] + number)
        else:
            short = re.sub(r"\s+", " ", row["message"]).replace("|", "/").replace("`", "'")
            short = short if len(short) <= 70 else short[:67].rstrip() + "..."
            said[f"**error**, `{short}`"].append(row["model"])
    return "; ".join(f"{what}: {', '.join(models)}" for what, models in said.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "page"))
    what = parser.parse_args().what
    if what == "run":
        found = rows()
        ROWS.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    PAGE.write_text(page(read()), encoding="utf-8")


if __name__ == "__main__":
    main()
