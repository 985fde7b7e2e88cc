"""A small server that speaks the chat protocol of OpenAI, in a thread, answering from a tiny causal model, with faults.

Knows nothing of the client.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from promptuary.testing import tiny

KEY = "sk-key-of-the-test-0123456789"

Fault = Callable[["Handler", dict[str, Any]], bool]
"""Answers in some other way; true if it did."""


class TinyChat:
    """Answers of a tiny model to messages: greedy, or sampled with the seed of the request."""

    def __init__(self) -> None:
        self.model, self.tokenizer = tiny.model("llama"), tiny.tokenizer(specials="start")

    def answer(self, request: dict[str, Any], number: int) -> tuple[str, int, int, list[tuple[str, float]]]:
        text = " ".join(one["content"] for one in request["messages"])
        ids = torch.tensor([self.tokenizer(text).input_ids[-40:]])
        most = min(8, request.get("max_tokens") or request.get("max_completion_tokens"))
        options: dict[str, Any] = {"do_sample": False}
        if request.get("temperature"):
            torch.manual_seed(request.get("seed", 0) + 1000 * number)
            options = {"do_sample": True, "temperature": request["temperature"], "top_k": 0}
        with torch.no_grad():
            first = self.model(ids).logits[0, -1].log_softmax(-1)
            written = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, pad_token_id=0, **options
            )[0, ids.shape[1] :]
        tops = [(self.tokenizer.decode([int(token)]), float(first[token])) for token in first.topk(20).indices]
        return self.tokenizer.decode(written, skip_special_tokens=True), ids.shape[1], len(written), tops


class Quiet(ThreadingHTTPServer):
    """Says nothing of clients that went away."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass


class Chat:
    """The server. `faults` are taken one per request; `script` answers instead of the model; `asked`: all requests."""

    def __init__(self) -> None:
        self.model = TinyChat()
        self.faults: list[Fault] = []
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.script: Callable[[dict[str, Any]], str] | None = None
        self.takes_n, self.usage, self.logprobs = True, True, True
        self.lock = threading.Lock()
        chat = self

        class Bound(Handler):
            server_chat = chat

        self.server = Quiet(("127.0.0.1", 0), Bound)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def choices(self, request: dict[str, Any]) -> tuple[list[dict[str, Any]], int, int]:
        count = request.get("n", 1) if self.takes_n else 1
        out, asked, given = [], 0, 0
        for number in range(count):
            if self.script is not None:
                text, tokens, tops = self.script(request), 3, []
                asked = sum(len(one["content"].split()) for one in request["messages"])
            else:
                text, asked, tokens, tops = self.model.answer(request, number)
            given += tokens
            choice: dict[str, Any] = {
                "index": number, "finish_reason": "stop", "message": {"role": "assistant", "content": text}
            }  # fmt: skip
            if request.get("logprobs") and self.logprobs and tops:
                listed = [{"token": token, "logprob": value, "bytes": None} for token, value in tops]
                choice["logprobs"] = {"content": [{**listed[0], "top_logprobs": listed}]}
            out.append(choice)
        return out, asked, given


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_chat: Chat

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        chat = self.server_chat
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with chat.lock:
            chat.asked.append(request)
            chat.headers.append({name.lower(): value for name, value in self.headers.items()})
            fault = chat.faults.pop(0) if chat.faults else None
        if fault is None or not fault(self, request):
            self.send(200, self.whole(request))

    def whole(self, request: dict[str, Any]) -> dict[str, Any]:
        with self.server_chat.lock:
            choices, asked, given = self.server_chat.choices(request)
        found = {"id": "x", "object": "chat.completion", "created": 0, "model": request["model"], "choices": choices}
        if self.server_chat.usage:
            found["usage"] = {"prompt_tokens": asked, "completion_tokens": given, "total_tokens": asked + given}
        return found

    def send(self, state: int, body: Any, headers: dict[str, str] | None = None, cut: int = 0) -> bool:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(state)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) - cut])
        if cut:
            self.close_connection = True
        return True


def state(number: int, message: str = "no", **headers: str) -> Fault:
    def fault(handler: Handler, request: dict[str, Any]) -> bool:
        return handler.send(
            number, {"error": {"message": message}}, {name.replace("_", "-"): value for name, value in headers.items()}
        )

    return fault


def slow(seconds: float) -> Fault:
    def fault(handler: Handler, request: dict[str, Any]) -> bool:
        time.sleep(seconds)
        handler.close_connection = True
        return True

    return fault


def dripping(seconds: float) -> Fault:
    """A byte at a time, so that no single read is late."""

    def fault(handler: Handler, request: dict[str, Any]) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Connection", "close")
        handler.end_headers()
        until = time.monotonic() + seconds
        try:
            while time.monotonic() < until:
                handler.wfile.write(b" ")
                handler.wfile.flush()
                time.sleep(0.02)
        except OSError:
            pass
        handler.close_connection = True
        return True

    return fault


def cut_off(handler: Handler, request: dict[str, Any]) -> bool:
    return handler.send(200, handler.whole(request), cut=40)


def not_json(handler: Handler, request: dict[str, Any]) -> bool:
    return handler.send(200, b'{"choices": [{"message": {"content": "half')


def raw(body: Any) -> Fault:
    return lambda handler, request: handler.send(200, body)


def says(content: Any, ends: str = "stop", **message: Any) -> Fault:
    choice = {"index": 0, "finish_reason": ends, "message": {"role": "assistant", "content": content, **message}}
    return raw({"choices": [choice]})


def refuses_field(name: str) -> Fault:
    def fault(handler: Handler, request: dict[str, Any]) -> bool:
        if name not in request:
            return False
        return handler.send(400, {"error": {"message": f"Unsupported parameter: '{name}'", "param": name}})

    return fault


@contextmanager
def chatting() -> Iterator[Chat]:
    chat = Chat()
    thread = threading.Thread(target=chat.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield chat
    finally:
        chat.server.shutdown()
        chat.server.server_close()
        thread.join()
