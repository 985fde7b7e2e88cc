"""The command `promptuary`: its verbs, and what becomes of an error.

Knows nothing of what a verb does. The only place that catches `Exception`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Annotated

import typer

import promptuary
from promptuary.cli import (
    compare,
    console,
    demo,
    doctor,
    evaluate,
    export,
    hub,
    import_,
    inspect,
    methods,
    predict,
    report,
    schema,
    train,
)
from promptuary.errors import PromptuaryError

STOPPED = {128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
"""Exit codes of a stop by a signal, as a shell gives them."""

PATHS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP),
}
"""What the system says of a path that cannot be used: another one mends it."""

FIXES = dict.fromkeys(PATHS, "choose another path, or change its permissions") | {
    errno.ENOSPC: "make room; a run goes on with --resume",
    errno.EDQUOT: "make room; a run goes on with --resume",
}

app = typer.Typer(
    name="promptuary",
    help="Learn prompts for a frozen model: small files that give one model many tasks.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(train.train)
app.command()(compare.compare)
app.command()(evaluate.evaluate)
app.command()(predict.predict)
app.command()(report.report)
app.command()(inspect.inspect)
app.command()(export.export)
app.command()(hub.push)
app.command()(hub.pull)
app.command("import")(import_.import_)
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
        The exit code: 0 done, 1 our fault or the machine's (a closed pipe), 2 the user's input is wrong or cannot be
        used (also a path, a full disk), 130, 143 or 129 stopped by a signal.
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
            # what is still on its way out fails here, where it can be told, and not when Python ends
            sys.stdout.flush()
    except SystemExit as stop:
        code = stop.code
    except BrokenPipeError:
        # whoever read the output has gone and needs no explanation
        _give_up_output()
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        code = _explain(error, as_json)
        _give_up_output()
        return code
    if code in STOPPED:
        console.fail("interrupted", as_json=as_json, prefix="")
    return code if isinstance(code, int) else 0


def _give_up_output() -> None:
    """Drop what standard output cannot take; Python would try once more, and complain, when it closes it."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _explain(error: Exception, as_json: bool) -> int:
    """One line for an error, and its exit code."""
    if isinstance(error, PromptuaryError):
        stopped = error.exit_code in STOPPED
        console.fail(str(error), as_json=as_json, prefix="" if stopped else "error: ")
        return error.exit_code
    if isinstance(error, typer.TyperException):
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        console.fail(f"{message[:1].lower()}{message[1:]} (--help tells more)", as_json=as_json)
        return 2
    if isinstance(error, OSError) and error.errno is not None:
        where = "" if error.filename is None else f": {error.filename}"
        fix = FIXES.get(error.errno, "--debug shows the traceback")
        console.fail(f"{(error.strerror or type(error).__name__).lower()}{where} ({fix})", as_json=as_json)
        return 2 if error.errno in PATHS else 1
    reason = f"{type(error).__name__}: {error}".rstrip(": ")
    console.fail(f"{reason} (a fault of promptuary; --debug shows the traceback)", as_json=as_json)
    return 1


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the program through its clean-ups, with their own exit codes."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        # signals belong to somebody else
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    # what is ignored, as SIGHUP is under nohup, stays ignored
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
