"""What the verbs share: arguments, one line for an error, one JSON object, tables and progress on standard error.

Knows no verb, and nothing of training but the events that a listener is told.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from promptuary.errors import ConfigError
from promptuary.listening import Listener

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

    from promptuary.training import Training

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, and nothing else there.")]
Prompt = Annotated[
    Path, typer.Argument(metavar="PROMPT", help="A prompt folder, the run folder around it, or a hub name.")
]
Local = Annotated[Path, typer.Argument(metavar="PROMPT", help="A prompt folder, or the run folder around it.")]
Model = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Where the base model is, if not where it was trained.")
]
Other = Annotated[
    str | None,
    typer.Option(
        "--backbone", metavar="OTHER", help="Another base, of any family, that a prompt of words is carried to."
    ),
]
Device = Annotated[str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1 or mps.")]
Texts = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TEXT or IMAGE ...]", help="Texts, or files of images; - reads them from standard input, one a line."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option("--data", metavar="FILE", help="Examples without labels: .jsonl, .json, .csv, .tsv or .parquet."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples that are run together.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Change a setting; may be given several times.")
]


def quiet() -> None:
    """Keep the libraries underneath from writing bars and warnings. Call it before they are imported."""
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_VERBOSITY", "error"),
        ("DATASETS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def console() -> Console:
    """Rich's console on standard error."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


def emit(content: Any) -> None:
    """The one JSON object on standard output, in ASCII, so that every terminal and pipe takes it."""
    print(json.dumps(finite(content)), flush=True)


def finite(value: Any) -> Any:
    """The same with None where a number is not finite, which JSON cannot say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def fail(message: str, *, as_json: bool, prefix: str = "error: ") -> None:
    """What went wrong, in one line; with `as_json` also as an object on standard output."""
    line = " ".join(message.split())
    if as_json:
        # where standard output itself has failed, the line below is all that can be said
        with contextlib.suppress(OSError):
            emit({"error": line})
    say(prefix + line)


def examples(texts: Sequence[str] | None, data: Path | None) -> list[Any]:
    """What was given as texts (- is standard input) or as a file.

    Raises:
        ConfigError: both were given, a text is empty, or standard input holds none.
        DataError: the file cannot be read.
    """
    if texts and data is not None:
        raise ConfigError("Give texts, or --data FILE, not both")
    if data is not None:
        from promptuary.data.load import read_examples

        return list(read_examples(data))
    found = [line.rstrip("\n") for line in _lines()] if texts == ["-"] else list(texts or [])
    if texts and not found:
        raise ConfigError("standard input holds no text; expected one on each line")
    if any(not text.strip() for text in found):
        raise ConfigError("a text is empty; give at least one word")
    return found


def _lines() -> list[str]:
    """Lines of standard input that are not blank.

    Raises:
        ConfigError: it is no UTF-8 text.
    """
    try:
        return [line for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ConfigError(f"standard input holds byte {byte:#04x}, not UTF-8 text; convert it first") from None


def check_file(option: str, path: Path) -> None:
    """Refuse a file that could not be written, before the work is done.

    Raises:
        ConfigError: it is a folder, or what should be its folder is none.
    """
    if not path.name or path.is_dir():
        raise ConfigError(f"{option} {path} is a folder; give the name of a file")
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise ConfigError(f"{option} {path} cannot be written: {above} is no folder; choose another place")


@contextlib.contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Say what keeps a file from being written.

    Raises:
        ConfigError: with the system's reason.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written: {error.strerror}; choose another place") from None


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """A table on standard error; lines of aligned columns where that is not a terminal."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    on = console()
    if on.is_terminal:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        drawn = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, show_header=any(columns))
        for column in columns:
            drawn.add_column(column, overflow="fold")
        for row in cells:
            drawn.add_row(*map(Text, row))
        on.print(drawn)
        return
    if title:
        say(title)
    lines = [list(columns), *cells] if any(columns) else cells
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def score(value: float | None, interval: Sequence[float] | None = None) -> str:
    """A score with its interval, if there is one."""
    if value is None:
        return ""
    return f"{value:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def bar(share: float, width: int = 20) -> str:
    """A share as a bar."""
    return "█" * round(share * width) + "·" * (width - round(share * width))


def score_rows(scores: Mapping[str, float], primary: str, interval: Sequence[float] | None) -> list[tuple[str, str]]:
    """Every score by name; the interval belongs to the primary one."""
    return [(name, score(value, interval if name == primary else None)) for name, value in scores.items()]


class Progress(Listener):
    """Draws a training run: plan, then a bar on a terminal or a line per validation elsewhere."""

    def __init__(self, *, brief: bool = False) -> None:
        """With `brief`, one line instead of the plan."""
        self.brief = brief
        self.bar: Bar | None = None
        self.latest: Mapping[str, Any] = {}
        self.primary = ""

    def __enter__(self) -> Progress:
        """Nothing is drawn before the plan."""
        return self

    def __exit__(self, *raised: object) -> None:
        """Take the bar away, so that an error stands on a line of its own."""
        self.stop()

    def stop(self) -> None:
        """End the bar, if there is one."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def begun(self, training: Training) -> None:
        """Another run may have been drawn before this one."""
        self.stop()

    def planned(self, plan: Mapping[str, Any]) -> None:
        """Show the plan and start the bar."""
        self.total, self.began, self.first = int(plan["steps"]), time.monotonic(), 0
        self.latest = {}
        if self.brief:
            say(f"{plan['method']}: {plan['trainable_parameters']:,} trained numbers, {plan['steps']} steps")
        else:
            table(("", ""), plan_rows(plan))
        on = console()
        if not on.is_terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.bar = Bar(
            BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn(), console=on
        )
        self.task = self.bar.add_task("starting", total=self.total)
        self.bar.start()

    def stepped(self, row: Mapping[str, Any]) -> None:
        """Move the bar."""
        self.first = self.first or int(row["step"])
        self.latest = row
        if self.bar is not None:
            loss = "" if row["loss"] is None else f"loss {row['loss']:.4f}  "
            best = f"{self.primary} {row['best']:.4f}  " if self.primary and row["best"] is not None else ""
            text = f"{loss}{best}{row['tokens_per_second']:,.0f} tokens/s"
            self.bar.update(self.task, completed=row["step"], description=text)

    def validated(self, row: Mapping[str, Any]) -> None:
        """A line, where there is no bar."""
        self.primary = row["primary"]
        if self.bar is not None:
            return
        parts = [f"step {row['step']}/{self.total}"]
        if self.latest.get("loss") is not None:
            parts.append(f"loss {self.latest['loss']:.4f}")
        best = f" (best {row['best']:.4f} at step {row['best_step']})" if row["best"] is not None else ""
        parts.append(f"{self.primary} {row[self.primary]:.4f}{best}")
        if self.latest:
            done = row["step"] - self.first + 1
            left = (time.monotonic() - self.began) / max(done, 1) * (self.total - row["step"])
            parts += [f"{self.latest['tokens_per_second']:,.0f} tokens/s", f"{left:.0f} s left"]
        say("  ".join(parts))

    def noted(self, text: str) -> None:
        """A line."""
        if self.bar is not None:
            self.bar.console.print(f"note: {text}", markup=False)
        else:
            say(f"note: {text}")


class Lines(Listener):
    """One run among several: a line for its plan, for each validation and for each note, with its name before it."""

    def __init__(self, name: str) -> None:
        """Of a run that is called so."""
        self.name = name

    def planned(self, plan: Mapping[str, Any]) -> None:
        """What will be trained."""
        say(f"{self.name}: {plan['method']}, {plan['trainable_parameters']:,} trained numbers, {plan['steps']} steps")

    def validated(self, row: Mapping[str, Any]) -> None:
        """How far it is."""
        primary = row["primary"]
        best = f" (best {row['best']:.4f} at step {row['best_step']})" if row["best"] is not None else ""
        say(f"{self.name}: step {row['step']}  {primary} {row[primary]:.4f}{best}")

    def noted(self, text: str) -> None:
        """Something to know."""
        say(f"{self.name}: note: {text}")


def plan_rows(plan: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a run will do, for a table."""
    cut = f" ({plan['cut_texts']} texts are cut)" if plan["cut_texts"] else ""
    return [
        ("method", f"{plan['method']} on {plan['backbone']}"),
        ("trainable parameters", f"{plan['trainable_parameters']:,} ({plan['prompt_bytes'] / 1024:,.1f} KiB)"),
        ("added tokens", f"{plan['added_tokens']}"),
        ("examples", ", ".join(f"{count:,} {split}" for split, count in plan["examples"].items())),
        ("longest text", f"{plan['longest_text']} tokens{cut}"),
        ("steps", f"{plan['steps']:,} of {plan['batch_size']} examples"),
        ("memory", f"about {plan['memory_bytes_estimate'] / 2**20:,.0f} MiB"),
        ("writes", f"{plan['out']}: {', '.join(plan['writes'])}"),
    ]
