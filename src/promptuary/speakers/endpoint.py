"""Any OpenAI-compatible endpoint, through the `openai` package: retries, time-outs, rate limits, budgets.

Knows no method and no task. A key is read from the environment and stands in no message, file, log or answer.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from promptuary.errors import ConfigError, SpeakerError, require
from promptuary.speakers.asked import Asked, Question, cut
from promptuary.speakers.base import SpeakerConfig
from promptuary.speakers.budget import Account, Ticket
from promptuary.speakers.cache import Cache, Reply

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
"""States of HTTP after which a further try may help."""

_LARGEST = 2**24
"""Bytes of an answer; more is no answer."""

_OPTIONAL = ("seed", "top_logprobs", "logprobs", "n", "stop", "max_tokens")
"""What some servers do not take; each has a way round."""


@dataclass(frozen=True)
class _Failure:
    """Why a request had no answer: `state` of HTTP or 0; `again`: whether to try again, `after` how many seconds."""

    reason: str
    state: int = 0
    again: bool = False
    after: float | None = None
    said: str = ""


class Endpoint(Asked):
    """A model behind an endpoint. Safe to be asked by several threads."""

    def __init__(
        self,
        config: SpeakerConfig,
        *,
        account: Account | None = None,
        cache: Cache | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Talk to an endpoint; it is reached when something is asked.

        Args:
            config: with a `base_url`.
            account: what its requests are booked on.
            cache: where answers are kept.
            sleep: waits for so many seconds.
            clock: seconds that pass.

        Raises:
            MissingExtra: the openai package is not installed.
            ConfigError: no `base_url`, or the environment holds something that is no key.
        """
        if config.base_url is None:
            raise ConfigError("base_url: name the endpoint, such as http://localhost:8000/v1")
        self._openai, self._http = require("openai", extra="llm"), require("httpx2", extra="llm")
        super().__init__(config.model, {"endpoint": config.base_url, "model": config.model}, account, cache)
        self.config, self._sleep, self._clock = config, sleep, clock
        self._key = read_key(config.api_key_env)
        self._client: Any = None
        self._lock = threading.Lock()
        self._next_at = 0.0
        self._chance = random.Random(0)  # only spreads tries over time
        self.dropped = set[str]()
        """What the server did not take and is no longer sent."""

    def close(self) -> None:
        """Close connections and the cache; they open again when they are used."""
        super().close()
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    # ---- one question ------------------------------------------------------------------------------------------------

    def _ask(self, question: Question, slots: Sequence[int]) -> Iterator[list[Reply]]:
        left = list(slots)
        while left:
            wanted = 1 if "n" in self.dropped else len(left)
            replies = self._answered(question, wanted, left[0])
            if len(replies) < wanted:
                self.dropped.add("n")  # the server takes no notice of it
            del left[: len(replies)]
            yield replies

    def _answered(self, question: Question, n: int, slot: int) -> list[Reply]:
        """Answers of one request, tried as often as the settings say."""
        tries = 0
        while True:
            several = n if "n" not in self.dropped else 1
            body = self._body(question, several, slot)
            found = self._once(question, body, several)
            if not isinstance(found, _Failure):
                return found
            self.account.note("failed")
            if (lacking := self._not_taken(found, body)) is not None:
                self.dropped |= lacking
                continue
            wait = self._wait(found, tries)
            if not found.again or tries >= self.config.retries or wait > self.config.patience:
                raise SpeakerError(self._complaint(found, tries, wait))
            tries += 1
            self._sleep(wait)

    def _body(self, question: Question, n: int, slot: int) -> dict[str, Any]:
        limit = "max_completion_tokens" if "max_tokens" in self.dropped else "max_tokens"
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": [dict(one) for one in question.messages],
            "temperature": question.temperature,
            limit: question.max_tokens,
        }
        if question.temperature > 0 and question.top_p < 1:
            body["top_p"] = question.top_p
        if n > 1:
            body["n"] = n
        if question.seed is not None:
            body["seed"] = question.seed + slot
        if question.stop:
            body["stop"] = list(question.stop[:4])  # the protocol takes four; the answer is cut at all of them
        if question.tops:
            body |= {"logprobs": True, "top_logprobs": question.tops}
        return {name: value for name, value in body.items() if name == limit or name not in self.dropped}

    def _once(self, question: Question, body: dict[str, Any], n: int) -> list[Reply] | _Failure:
        """One request: reserved before, booked behind."""
        size = question.size
        ticket = self.account.reserve(size, n * question.max_tokens)
        try:
            self._take_turn()
            found = self._sent(body)
        except BaseException:  # a stop in the middle: what it cost is not known
            self.account.settle(ticket)
            raise
        if isinstance(found, _Failure):
            if found.state < 0:
                self.account.release(ticket)
            else:
                # a refusal by state costs nothing; of an answer that broke on its way the cost is not known
                self.account.settle(ticket, *((0, 0) if found.state else (None, None)))
            return found
        replies = [self._reply(choice, question.stop) for choice in _choices(found)[:n]]
        if not replies or any(one is None for one in replies):
            self.account.settle(ticket)
            return _Failure("its answer holds no choices with messages", again=True)
        known = [one for one in replies if one is not None]
        self._settle(ticket, found, sum(len(one.text.encode()) for one in known), size)
        return known

    def _sent(self, body: dict[str, Any]) -> dict[str, Any] | _Failure:
        """The answer as JSON, read within the time-out as a whole."""
        openai, http = self._openai, self._http
        until = self._clock() + self.config.timeout
        late = _Failure(f"no whole answer within {self.config.timeout:g} s", again=True)
        content = bytearray()
        try:
            with self._opened().chat.completions.with_streaming_response.create(**body) as response:
                for chunk in response.iter_bytes():
                    content += chunk
                    if self._clock() > until:
                        return late
                    if len(content) > _LARGEST:
                        return _Failure(f"its answer is longer than {_LARGEST} bytes", again=True)
        except openai.APIStatusError as error:
            return self._refused(error)
        except (openai.APITimeoutError, http.TimeoutException):
            return late
        except (openai.APIConnectionError, http.HTTPError) as error:
            cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
            if isinstance(cause, http.ConnectError | http.UnsupportedProtocol | http.ProxyError):
                return _Failure("cannot be reached", state=-1, again=True)
            return _Failure("the connection was cut", again=True)
        except (openai.OpenAIError, ValueError) as error:  # such as a body that is no text
            return _Failure(f"its answer cannot be read ({type(error).__name__})", again=True)
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            return _Failure("its answer is not whole JSON", again=True)
        return found if isinstance(found, dict) else _Failure("its answer is not a JSON object", again=True)

    def _refused(self, error: Any) -> _Failure:
        state, body = int(error.status_code), error.body
        inner = body.get("error", body) if isinstance(body, Mapping) else body
        parts = [inner.get(name) for name in ("message", "param", "code")] if isinstance(inner, Mapping) else [inner]
        said = self._clean(" ".join(str(one) for one in parts if one))
        again = state in _AGAIN and "insufficient_quota" not in said
        return _Failure("", state, again, _seconds(error.response.headers), said)

    def _reply(self, choice: Any, stop: Sequence[str]) -> Reply | None:
        message = choice.get("message") if isinstance(choice, Mapping) else None
        if not isinstance(message, Mapping):
            return None
        content, ends = message.get("content"), choice.get("finish_reason")
        if isinstance(content, list):  # some servers give parts
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
        text = cut(self._hidden(content), stop) if isinstance(content, str) else ""
        refused = ends == "content_filter" or (not text and isinstance(message.get("refusal"), str))
        ends = "refused" if refused else "length" if ends == "length" else "stop"
        return Reply(text, ends, _tops(choice.get("logprobs")))

    def _settle(self, ticket: Ticket, found: Mapping[str, Any], answered: int, size: int) -> None:
        """By what the server counted; without that by the estimate, a token for each byte."""
        usage = found.get("usage")
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else []
        if len(counts) == 2 and all(isinstance(one, int) and one >= 0 for one in counts):
            self.account.settle(ticket, *counts)
        else:
            self.account.settle(ticket, size, min(answered + 1, ticket.worst.tokens_out))

    # ---- tries -------------------------------------------------------------------------------------------------------

    def _not_taken(self, failure: _Failure, body: Mapping[str, Any]) -> set[str] | None:
        """What of the request the server names as the reason of its refusal, and can be done without."""
        if failure.state not in (400, 422, 501):
            return None
        sent = [name for name in _OPTIONAL if name in body]
        named = [name for name in sent if re.search(rf"(?<![A-Za-z_]){name}(?![A-Za-z_])", failure.said)]
        if {"logprobs", "top_logprobs"} & {*named}:
            return {"logprobs", "top_logprobs"}
        if named:
            return {named[0]}
        return {"n"} if "n" in sent else None

    def _wait(self, failure: _Failure, tries: int) -> float:
        """Seconds before the next try: as the server says, else twice as long each time, with some chance in it."""
        if failure.after is not None:
            return failure.after
        return min(self.config.patience, 2.0**tries) * (0.5 + 0.5 * self._chance.random())

    def _take_turn(self) -> None:
        """Wait as the rate limit says."""
        if self.config.requests_per_minute is None:
            return
        with self._lock:
            now = self._clock()
            turn = max(now, self._next_at)
            self._next_at = turn + 60 / self.config.requests_per_minute
        if turn > now:
            self._sleep(turn - now)

    def _complaint(self, failure: _Failure, tries: int, wait: float) -> str:
        where = f"{self.name} at {self.config.base_url}"
        said = f": {failure.said}" if failure.said else ""
        if failure.state in (401, 403):  # what the server says may hold a part of the key
            fix = "check that it is right and may use this model" if self._key else "set it in the environment"
            return f"{where} refuses the key of {self.config.api_key_env} (HTTP {failure.state}); {fix}"
        if failure.state == 404:
            return f"{where} is not there (HTTP 404){said}; check model, and base_url, which usually ends in /v1"
        if failure.state > 0 and not failure.again:
            return f"{where} refuses the request (HTTP {failure.state}){said}"
        reason = failure.reason or f"HTTP {failure.state}{said}"
        if wait > self.config.patience:
            return f"{where}: {reason}; it asks to wait {wait:g} s, and patience is {self.config.patience:g} s"
        again = "time" if tries == 0 else "times"
        return f"{where}: {reason}, {tries + 1} {again} in a row; what was answered before is kept, try again later"

    # ---- the key -----------------------------------------------------------------------------------------------------

    def _opened(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = self._openai.OpenAI(
                    api_key=self._key or "none",
                    base_url=self.config.base_url,
                    max_retries=0,
                    timeout=self.config.timeout,
                )
            return self._client

    def _hidden(self, text: str) -> str:
        """A text of the server's without the key, should it hold it."""
        return text.replace(self._key, "***") if self._key else text

    def _clean(self, text: str) -> str:
        """One short line of it."""
        line = "".join(one if one.isprintable() else " " for one in self._hidden(text))
        line = " ".join(line.split())
        return line if len(line) <= 200 else line[:200] + "..."


def read_key(variable: str) -> str:
    """A key from the environment; empty without one.

    Raises:
        ConfigError: it holds something that no key does; it is not shown.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(f"the environment variable {variable} holds no key: there are spaces or odd characters in it")
    return key


def _choices(found: Mapping[str, Any]) -> list[Any]:
    choices = found.get("choices")
    return choices if isinstance(choices, list) else []


def _tops(logprobs: Any) -> tuple[tuple[str, float], ...]:
    """The likeliest first tokens, from what the protocol calls `logprobs`; empty if it is not there or is otherwise."""
    try:
        first = logprobs["content"][0]["top_logprobs"]
        return tuple((str(one["token"]), float(one["logprob"])) for one in first)
    except (TypeError, KeyError, IndexError, ValueError):
        return ()


def _seconds(headers: Mapping[str, str]) -> float | None:
    """What `Retry-After` says: seconds or a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
