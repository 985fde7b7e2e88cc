"""`promptuary push` and `promptuary pull`: prompts to and from the Hugging Face hub.

Knows no file of a prompt. A token is never an argument, where others on the machine could read it: the hub's own
log-in (`hf auth login`) and `HF_TOKEN` are used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from promptuary.cli import console

Repo = Annotated[str, typer.Argument(metavar="REPO", help="user/name on the hub.")]


def push(
    prompt: console.Local,
    repo: Repo,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a repository that is made now.")
    ] = None,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Made if it does not exist.")] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Of the commit.")] = None,
    license: Annotated[str | None, typer.Option(metavar="ID", help="For the card, such as apache-2.0.")] = None,
    language: Annotated[
        list[str] | None, typer.Option(metavar="CODE", help="For the card, such as en; may be given several times.")
    ] = None,
    as_json: console.Json = False,
) -> None:
    """Put a prompt on the Hugging Face hub, with its card."""
    from promptuary import hub

    done = hub.push_prompt(
        prompt,
        repo,
        private=private,
        revision=revision,
        message=message,
        license=license,
        language=language or (),
    )
    console.say(f"{len(done.files)} files in {done.url}")
    if as_json:
        console.emit({"repo": done.repo, "url": done.url, "commit": done.commit, "files": done.files})


def pull(
    repo: Repo,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new or empty folder.")],
    revision: Annotated[str | None, typer.Option(metavar="REVISION", help="Branch, tag or commit.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older prompt in that folder.")] = False,
    as_json: console.Json = False,
) -> None:
    """Get a prompt from the Hugging Face hub."""
    from promptuary import hub

    found = hub.pull_prompt(repo, revision=revision, out=out, overwrite=overwrite)
    names = sorted(path.name for path in found.iterdir())
    console.say(f"{len(names)} files in {found}")
    if as_json:
        console.emit({"repo": repo, "revision": revision, "out": str(found), "files": names})
