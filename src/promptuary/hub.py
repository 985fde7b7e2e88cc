"""Prompt folders on the Hugging Face hub: pushed in one commit with a card, pulled with bounded sizes and checked.

Knows no method, task or base; what the files mean stands in checkpoint.py and card.py.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2  # the client of huggingface_hub 2, for its errors
import huggingface_hub
from huggingface_hub import constants, errors

import promptuary
from promptuary import card, checkpoint, files
from promptuary.errors import ConfigError, FileFormatError, HubError
from promptuary.tuned import Tuned

MEBIBYTE = 2**20
LARGEST: Mapping[str, int] = {
    checkpoint.FACTS: 4 * MEBIBYTE,
    checkpoint.CARD: 4 * MEBIBYTE,
    checkpoint.TENSORS: 1024 * MEBIBYTE,
    checkpoint.CONSTANTS: 1024 * MEBIBYTE,
    checkpoint.FOLDED: 1024 * MEBIBYTE,
}
"""All that a prompt folder holds, and the most bytes of each that are downloaded (our choice)."""

NEEDED = (checkpoint.FACTS, checkpoint.TENSORS)

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""The repository's part of a hub name."""


@dataclass(frozen=True)
class Pushed:
    """Where a prompt went: `repo`, `url` of the page, `commit`, and the names of its files."""

    repo: str
    url: str
    commit: str
    files: tuple[str, ...]


def is_name(text: str) -> bool:
    """Whether this reads as "user/name" or "user/name@revision" and its first part is no folder here."""
    repo, _, _ = text.partition("@")
    return NAME.fullmatch(repo) is not None and Path(repo).parts[0] not in ("", "..") and not Path(repo).parent.exists()


def push_prompt(
    prompt: Tuned | str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
    license: str | None = None,
    language: Sequence[str] = (),
) -> Pushed:
    """Put a prompt on the hub, in one commit. Only the files of a prompt folder are sent, after they were checked.

    Args:
        prompt: a prompt folder, the run folder around it, or a tuned prompt.
        repo: "user/name"; made if it does not exist.
        private: who may see a repository that is made now; None is the account's own default.
        revision: branch; made if it does not exist.
        token: of the hub; None is that of `hf auth login` or `HF_TOKEN`.
        message: of the commit.
        license: for the card, such as "apache-2.0".
        language: for the card, such as ["en"].

    Raises:
        HubError: refused, not reachable, or the repository holds something else.
        FileFormatError: the folder is damaged or incomplete; nothing is sent.
        ConfigError: not a name of a repository.
    """
    if NAME.fullmatch(repo) is None:
        raise ConfigError(f'a hub name is written as "user/name", got "{repo}"')
    if isinstance(prompt, Tuned):
        with tempfile.TemporaryDirectory() as folder:
            contents = read_folder(checkpoint.save_prompt(prompt, Path(folder) / "prompt"))
    else:
        contents = read_folder(checkpoint.find_local(prompt))
    if checkpoint.CARD not in contents:
        raise FileFormatError(f"{prompt} has no card ({checkpoint.CARD}); save the prompt again")
    text = contents[checkpoint.CARD].decode("utf-8", errors="replace")
    contents[checkpoint.CARD] = card.for_hub(text, repo, license=license, language=language).encode()
    api = _api(token)
    with _explained(repo, "pushed to"):
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        there = {file.rfilename for file in api.model_info(repo, revision=revision).siblings or ()} - {".gitattributes"}
        if there - {checkpoint.CARD} and checkpoint.FACTS not in there:
            raise HubError(f'{repo} already holds something else ("{min(there)}") and no prompt; choose another name')
        changes: list[Any] = [
            huggingface_hub.CommitOperationAdd(name, content) for name, content in sorted(contents.items())
        ]
        changes += [huggingface_hub.CommitOperationDelete(name) for name in sorted(there & LARGEST.keys() - contents)]
        done = api.create_commit(repo, changes, commit_message=message or "Upload prompt", revision=revision)
    return Pushed(repo, f"{api.endpoint}/{repo}", done.oid, tuple(sorted(contents)))


def pull_prompt(
    repo: str,
    *,
    revision: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    token: str | None = None,
) -> Path:
    """Get a prompt from the hub. Nothing but safetensors, JSON and the card is downloaded, and nothing in it is run.

    With `HF_HUB_OFFLINE=1` the copy that was pulled before is used, without a look at the hub.

    Args:
        repo: "user/name".
        revision: branch, tag or commit; None is the main branch.
        out: a new or empty folder; None leaves it in the hub's cache.
        overwrite: replace an older prompt in `out`.
        token: of the hub; None is that of `hf auth login` or `HF_TOKEN`.

    Returns:
        The prompt folder.

    Raises:
        HubError: refused, not reachable, not there, or too large.
        FileFormatError: what came is damaged or no prompt.
        ConfigError: not a name of a repository, or `out` is taken.
    """
    if NAME.fullmatch(repo) is None:
        raise ConfigError(f'a hub name is written as "user/name", got "{repo}"')
    if out is not None:
        _check_out(Path(out), overwrite)
    with _explained(repo, "pulled from"):
        linked = _cached(repo, revision) if constants.is_offline_mode() else _download(repo, revision, token)
        found = _plain(linked)
    contents = read_folder(found)
    if out is None:
        return found
    try:
        files.write_folder(Path(out), contents)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}") from None
    return Path(out)


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files of a prompt folder, checked as if it were loaded; what else lies there is left out.

    Raises:
        FileFormatError: incomplete or damaged.
    """
    hashes = checkpoint.read_facts(folder)["sha256"]
    contents = {name: (folder / name).read_bytes() for name in LARGEST if (folder / name).is_file()}
    for name in (checkpoint.TENSORS, checkpoint.CONSTANTS, checkpoint.FOLDED):
        if name in hashes or name in contents:
            if not isinstance(hashes.get(name), str):
                raise FileFormatError(f"{folder / checkpoint.FACTS} has no hash of {name}; save the prompt again")
            files.read_tensors(folder / name, hashes[name])
    return contents


# ---- down -----------------------------------------------------------------------------------------------------------


def _download(repo: str, revision: str | None, token: str | None) -> Path:
    """Into the hub's cache: the files of one commit, each as the hub's own hash says."""
    api = _api(token)
    info = api.model_info(repo, revision=revision, files_metadata=True)
    there = {file.rfilename: file for file in info.siblings or () if file.rfilename in LARGEST}
    for name in NEEDED:
        if name not in there:
            raise HubError(f"{repo} holds no prompt of this library (it has no {name})")
    for name, file in there.items():
        if file.size is None or file.size > LARGEST[name]:
            size = "an unknown size" if file.size is None else f"{file.size / MEBIBYTE:,.0f} MiB"
            raise HubError(f"{repo}: {name} has {size}, more than the {LARGEST[name] // MEBIBYTE} MiB of a prompt")
    paths = []
    for name, file in there.items():
        path = Path(api.hf_hub_download(repo, name, revision=revision))
        if not _matches(path, file):
            # a damaged file in the cache is fetched once more
            path = Path(api.hf_hub_download(repo, name, revision=revision, force_download=True))
        if not _matches(path, file):
            raise FileFormatError(f"{repo}: {name} is damaged: its content does not match the hash on the hub")
        paths.append(path)
    if {path.parent.name for path in paths} != {info.sha}:
        raise HubError(f"{repo} was changed while it was pulled; pull it again")
    return paths[0].parent


def _matches(path: Path, file: Any) -> bool:
    """Whether a file is what the hub lists: by sha256 where it is large, else by git's own hash."""
    if path.stat().st_size != file.size:
        return False
    content = path.read_bytes()
    if file.lfs is not None:
        return files.digest(content) == str(file.lfs.sha256)
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return blob.hexdigest() == str(file.blob_id)


def _cached(repo: str, revision: str | None) -> Path:
    """The folder of an earlier pull."""
    found = [huggingface_hub.try_to_load_from_cache(repo, name, revision=revision) for name in NEEDED]
    if not all(isinstance(path, str) for path in found):
        raise HubError(
            f"{repo} cannot be pulled: HF_HUB_OFFLINE is set and no earlier copy is in the cache; unset it, or pull "
            "the prompt where there is a network"
        )
    return Path(str(found[0])).parent


def _plain(linked: Path) -> Path:
    """The same commit as plain files, beside the links of the hub's cache: links in a prompt folder are refused."""
    found = linked.parent.parent / "promptuary" / linked.name
    contents = {name: (linked / name).resolve().read_bytes() for name in LARGEST if (linked / name).is_file()}
    if not all((found / name).is_file() and (found / name).read_bytes() == body for name, body in contents.items()):
        files.write_folder(found, contents)
    return found


def _check_out(out: Path, overwrite: bool) -> None:
    if out.is_file():
        raise ConfigError(f"{out} is a file; name a folder")
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if there and not overwrite:
        raise ConfigError(f"{out} is not empty; choose another folder, or overwrite it (--overwrite)")
    foreign = [name for name in there if name not in LARGEST]
    if foreign:
        raise ConfigError(f'{out} also holds "{foreign[0]}", which would be lost; choose another folder')


# ---- the hub --------------------------------------------------------------------------------------------------------


def _api(token: str | None) -> huggingface_hub.HfApi:
    return huggingface_hub.HfApi(token=token, library_name="promptuary", library_version=promptuary.__version__)


@contextmanager
def _explained(repo: str, doing: str) -> Iterator[None]:
    """Errors of the hub's client, of the network and of the server as one line."""
    try:
        yield
    except (HubError, FileFormatError):
        raise
    except errors.OfflineModeIsEnabled:
        raise HubError(f"{repo} cannot be {doing} the hub: HF_HUB_OFFLINE is set; unset it") from None
    except (httpx2.HTTPError, OSError, ValueError, RuntimeError) as error:
        raise HubError(f"{repo} cannot be {doing} the hub: {_reason(error, doing)}") from None


def _reason(error: BaseException, doing: str) -> str:
    """What is wrong and what mends it. The client wraps some errors in others, which say less."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__  # type: ignore[assignment]
    answered = next((one for one in chain if isinstance(one, errors.HfHubHTTPError)), None)
    if answered is not None:
        return _answer(answered)
    broken = next((one for one in chain if isinstance(one, httpx2.HTTPError | ConnectionError)), None)
    if broken is not None:
        other = ", or use an earlier copy with HF_HUB_OFFLINE=1" if doing.startswith("pulled") else ""
        return f"the connection failed ({type(broken).__name__}); check the network and HF_ENDPOINT{other}"
    text = " ".join(str(chain[0]).split()) or type(chain[0]).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


def _answer(error: errors.HfHubHTTPError) -> str:
    """A refusal of the server."""
    code = error.response.status_code
    said = f' ("{" ".join(error.server_message.split())[:200]}")' if error.server_message else ""
    if isinstance(error, errors.GatedRepoError):
        return "it is gated; ask for access on its page, then log in (hf auth login)"
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such branch, tag or commit; check the revision"
    if code == 401:
        return f"you are not logged in, the token is not valid, or it does not exist (401{said}); run hf auth login"
    if code == 403:
        return f"your token may not do that (403{said}); use a token with write access to it"
    if code == 404:
        return f"it does not exist, or it is private and you are not logged in (404{said}); check the name"
    if code == 429:
        return f"the hub got too many requests (429{said}); wait some minutes and try again"
    if code >= 500:
        return f"the hub has a fault ({code}{said}); try again later"
    return f"the hub refused it ({code}{said})"
