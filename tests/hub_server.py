"""A small hub: the part of its HTTP interface that huggingface_hub uses for models, in a thread, with faults to order.

Knows nothing of this library. Large files go through Git LFS (basic transfer), as they do without xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writer_of_the_test", "hf_reader_of_the_test"
"""A token that may write, and one that may only read."""


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """Branch or commit -> file -> (content, whether it is in LFS)."""

    private: bool = False
    commits: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, tree: dict[str, tuple[bytes, bool]], message: str = "") -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{branch}{sorted(tree)}".encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def tree(self, revision: str) -> dict[str, tuple[bytes, bool]] | None:
        return self.commits.get(self.branches.get(revision, revision))


class Hub:
    """The server. `fail` orders a fault; `asked` is every request as "METHOD path"."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.tokens: list[str | None] = []
        self.cards: list[str] = []
        self.faults: list[tuple[str, Callable[[Handler], bool]]] = []
        self.card_errors: list[str] = []
        hub = self

        class Bound(Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # large files lie on another host, which must not see a token
        self.cdn = self.url.replace("127.0.0.1", "localhost")
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def hold(self, name: str, files: dict[str, bytes]) -> None:
        """A public repository, as if it had been pushed."""
        made = self.repos[name] = Repo()
        made.commit("main", {path: (content, path.endswith(".safetensors")) for path, content in files.items()})

    def fail(self, where: str, status: int, message: str = "", **headers: str) -> None:
        """Answer requests whose "METHOD path" matches with a status."""

        def answer(handler: Handler) -> bool:
            handler.reply(status, {"error": message} if message else b"", headers)
            return True

        self.faults.append((where, answer))

    def cut(self, where: str) -> None:
        """Send half of a file and hang up, each time."""

        def answer(handler: Handler) -> bool:
            handler.half = True
            return False

        self.faults.append((where, answer))

    def spoil(self, where: str) -> None:
        """Send a file with one bit changed."""

        def answer(handler: Handler) -> bool:
            handler.flip = True
            return False

        self.faults.append((where, answer))

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        tree = self.repos[repo].tree(revision)
        assert tree is not None
        return {name: content for name, (content, _) in tree.items() if name != ".gitattributes"}


class Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"
    # headers and body are two writes, which would wait 40 ms for each other
    disable_nagle_algorithm = True
    half = False
    flip = False

    def log_message(self, *args: Any) -> None:
        pass

    # ---- plumbing ---------------------------------------------------------------------------------------------------

    def reply(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        if self.flip and body:
            body = bytes([*body[:-1], body[-1] ^ 1])
        self.send_response(status)
        more = {"Content-Length": str(len(body)), **(headers or {})}
        for name, value in more.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.half:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(body)

    def missing(self, code: str, status: int = 404) -> None:
        self.reply(status, {"error": code}, {"X-Error-Code": code})

    def handle_one(self) -> None:
        self.half = self.flip = False
        self.path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            self.body = b"".join(parts)
        asked = f"{self.command} {self.path}"
        self.state.asked.append(asked)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.state.tokens.append(self.token)
        for where, answer in self.state.faults:
            if re.search(where, asked) and answer(self):
                return
        for pattern, action in ROUTES:
            found = re.fullmatch(pattern, asked)
            if found:
                action(self, **found.groupdict())
                return
        self.reply(404, {"error": f"the test's hub has no {asked}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def repo(self, name: str) -> Repo | None:
        """A repository that this caller may see; else the answer is sent."""
        found = self.state.repos.get(name)
        if self.token is not None and self.token not in (WRITER, READER):
            self.reply(401, {"error": "Invalid credentials in Authorization header"})
            return None
        if found is None or (found.private and self.token is None):
            self.missing("RepoNotFound", 404 if self.token else 401)
            return None
        return found

    def may_write(self) -> bool:
        if self.token == WRITER:
            return True
        self.reply(403 if self.token == READER else 401, {"error": "you need a token with write access"})
        return False

    # ---- up ---------------------------------------------------------------------------------------------------------

    def create(self) -> None:
        if not self.may_write():
            return
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.state.repos:
            self.reply(409, {"error": "You already created this model repo", "url": f"{self.state.url}/{name}"})
            return
        made = self.state.repos[name] = Repo(private=asked.get("visibility") == "private")
        made.commit("main", {".gitattributes": (b"*.safetensors filter=lfs\n", False)})
        self.reply(200, {"url": f"{self.state.url}/{name}"})

    def branch(self, name: str, branch: str) -> None:
        found = self.repo(name)
        if found is None or not self.may_write():
            return
        if branch in found.branches:
            self.reply(409, {"error": "Reference already exists"})
            return
        found.branches[branch] = found.branches["main"]
        self.reply(200, {})

    def validate(self) -> None:
        self.state.cards.append(json.loads(self.body)["content"])
        problems = [{"message": text} for text in self.state.card_errors]
        self.reply(400 if problems else 200, {"errors": problems, "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        found = self.repo(name)
        if found is None or not self.may_write():
            return
        if found.tree(revision) is None:
            self.missing("RevisionNotFound")
            return
        wanted = json.loads(self.body)["files"]
        modes = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for one in wanted
        ]
        self.reply(200, {"files": modes})

    def batch(self, name: str) -> None:
        if not self.may_write():
            return
        found = []
        for one in json.loads(self.body)["objects"]:
            there = one["oid"] in self.state.objects
            href = {"href": f"{self.state.url}/lfs/{one['oid']}"}
            check = {"href": f"{self.state.url}/lfs-verify"}
            found.append(one if there else {**one, "actions": {"upload": href, "verify": check}})
        self.reply(200, {"transfer": "basic", "objects": found})

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.reply(400, {"error": "the content does not match its oid"})
            return
        self.state.objects[oid] = self.body
        self.reply(200)

    def verify(self) -> None:
        asked = json.loads(self.body)
        right = len(self.state.objects.get(asked["oid"], b"")) == asked["size"]
        self.reply(200 if right else 404, {})

    def commit(self, name: str, revision: str) -> None:
        found = self.repo(name)
        if found is None or not self.may_write():
            return
        tree, message = dict(found.tree(revision) or {}), ""
        for line in self.body.splitlines():
            asked = json.loads(line)
            value = asked["value"]
            if asked["key"] == "header":
                message = value["summary"]
            elif asked["key"] == "file":
                tree[value["path"]] = (base64.b64decode(value["content"]), False)
            elif asked["key"] == "lfsFile":
                tree[value["path"]] = (self.state.objects[value["oid"]], True)
            elif asked["key"] == "deletedFile":
                del tree[value["path"]]
        sha = found.commit(revision, tree, message)
        self.reply(200, {"commitUrl": f"{self.state.url}/{name}/commit/{sha}", "commitOid": sha})

    # ---- down -------------------------------------------------------------------------------------------------------

    def info(self, name: str, revision: str = "main") -> None:
        found = self.repo(name)
        if found is None:
            return
        tree = found.tree(revision)
        if tree is None:
            self.missing("RevisionNotFound")
            return
        siblings = []
        for path, (content, large) in tree.items():
            one: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": git_hash(content)}
            if large:
                sha256 = hashlib.sha256(content).hexdigest()
                one["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            siblings.append(one)
        sha = found.branches.get(revision, revision)
        self.reply(200, {"id": name, "sha": sha, "private": found.private, "tags": [], "siblings": siblings})

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self.repo(name)
        if found is None:
            return
        tree = found.tree(revision)
        if tree is None or path not in tree:
            self.missing("RevisionNotFound" if tree is None else "EntryNotFound")
            return
        content, large = tree[path]
        sha = found.branches.get(revision, revision)
        if not large:
            self.reply(200, content, {"X-Repo-Commit": sha, "ETag": f'"{git_hash(content)}"'})
            return
        oid = hashlib.sha256(content).hexdigest()
        self.state.objects[oid] = content
        headers = {"X-Repo-Commit": sha, "X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        self.reply(302, b"", {**headers, "Location": f"{self.state.cdn}/cdn/{oid}"})

    def cdn(self, oid: str) -> None:
        if self.token is not None:
            self.reply(400, {"error": "a token was sent to another host"})
            return
        content = self.state.objects[oid]
        span = self.headers.get("Range")
        self.reply(206 if span else 200, content[int(span[6:].partition("-")[0]) :] if span else content)


_NAME, _REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, Any]] = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST /api/models/{_NAME}/branch/(?P<branch>.+)", Handler.branch),
    (rf"POST /api/models/{_NAME}/preupload/{_REVISION}", Handler.preupload),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(?P<oid>\w+)", Handler.put),
    (r"POST /lfs-verify", Handler.verify),
    (rf"POST /api/models/{_NAME}/commit/{_REVISION}", Handler.commit),
    (rf"GET /api/models/{_NAME}", Handler.info),
    (rf"GET /api/models/{_NAME}/revision/{_REVISION}", Handler.info),
    (rf"(HEAD|GET) /{_NAME}/resolve/{_REVISION}/(?P<path>.+)", Handler.resolve),
    (r"(HEAD|GET) /cdn/(?P<oid>\w+)", Handler.cdn),
]
