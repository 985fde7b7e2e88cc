"""The command `promptuary`: its verbs, and what becomes of an error.

Knows nothing of what a verb does. The only place that catches `Exception`.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Annotated

import typer

import promptuary
from promptuary.cli import console, demo, doctor, evaluate, inspect, methods, predict, schema, train
from promptuary.errors import PromptuaryError

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM

app = typer.Typer(
    name="promptuary",
    help="Learn prompts for a frozen model: small files that give one model many tasks.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(train.train)
app.command()(evaluate.evaluate)
app.command()(predict.predict)
app.command()(inspect.inspect)
app.command()(methods.methods)
app.command()(schema.schema)
app.command()(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        print(promptuary.__version__)
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Learn prompts for a frozen model: small files that give one model many tasks."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        args: instead of `sys.argv[1:]`.

    Returns:
        The exit code: 0 done, 1 our fault, 2 the user's input is wrong, 130 or 143 stopped by a signal.
    """
    given = list(sys.argv[1:] if args is None else args)
    end = given.index("--") if "--" in given else len(given)
    debug, as_json = "--debug" in given[:end], "--json" in given[:end]
    given = [word for word in given[:end] if word != "--debug"] + given[end:]
    if not debug:
        console.quiet()
    try:
        with _termination():
            code = typer.main.get_command(app).main(given or ["--help"], prog_name="promptuary", standalone_mode=False)
    except SystemExit as stop:
        code = stop.code
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _explain(error, as_json)
    if code in (INTERRUPTED, TERMINATED):
        console.fail("interrupted; nothing was written", as_json=as_json, prefix="")
    return code if isinstance(code, int) else 0


def _explain(error: Exception, as_json: bool) -> int:
    """One line for an error, and its exit code."""
    if isinstance(error, PromptuaryError):
        stopped = error.exit_code in (INTERRUPTED, TERMINATED)
        console.fail(str(error), as_json=as_json, prefix="" if stopped else "error: ")
        return error.exit_code
    if isinstance(error, typer.TyperException):
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        console.fail(f"{message[:1].lower()}{message[1:]} (--help tells more)", as_json=as_json)
        return 2
    reason = f"{type(error).__name__}: {error}".rstrip(": ")
    console.fail(f"{reason} (a fault of promptuary; --debug shows the traceback)", as_json=as_json)
    return 1


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """Let SIGTERM end the program through its clean-ups, with its own exit code."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:
        # not the main thread: signals belong to somebody else
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
