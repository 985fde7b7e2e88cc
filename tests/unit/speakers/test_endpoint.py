from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import speaking_server as server
from promptuary.errors import BudgetExceeded, ConfigError, SpeakerError
from promptuary.speakers.base import SpeakerConfig, user
from promptuary.speakers.budget import Ledger
from promptuary.speakers.endpoint import Endpoint
from speaking_server import KEY, Chat

Make = Callable[..., Endpoint]
ASK = user("the cat sleeps")
LATE = (server.slow(0.8), server.dripping(2.0))


def test_an_answer_is_what_the_model_behind_the_endpoint_writes(chat: Chat, endpoint: Make) -> None:
    text = endpoint().generate(ASK, max_tokens=5)
    assert text == [chat.model.answer({"messages": ASK, "max_tokens": 5}, 0)[0]]
    (asked,) = chat.asked
    assert asked == {"model": "tiny", "messages": ASK, "temperature": 0.0, "max_tokens": 5}
    assert chat.headers[0]["authorization"] == f"Bearer {KEY}"


def test_several_answers_come_from_one_request(chat: Chat, endpoint: Make) -> None:
    texts = endpoint().generate(ASK, n=3, temperature=1.0, top_p=0.9, seed=4, stop=["."])
    assert len(texts) == 3
    assert len(set(texts)) > 1
    (asked,) = chat.asked
    assert (asked["n"], asked["seed"], asked["top_p"], asked["stop"]) == (3, 4, 0.9, ["."])


@pytest.mark.parametrize("how", ["ignored", "refused", "refused in silence"])
def test_where_a_server_gives_one_answer_several_are_asked_one_by_one(chat: Chat, endpoint: Make, how: str) -> None:
    chat.takes_n = False
    if how != "ignored":
        chat.faults = [server.refuses_field("n") if how == "refused" else server.state(400, "bad request")]
    speaker = endpoint()
    assert len(speaker.generate(ASK, n=3, temperature=1.0, seed=1)) == 3
    assert [one.get("seed") for one in chat.asked if "n" not in one] == ([2, 3] if how == "ignored" else [1, 2, 3])
    before = len(chat.asked)
    assert len(speaker.generate(ASK, n=3, temperature=1.0, seed=9)) == 3
    assert len(chat.asked) == before + 3  # it is not tried again


def test_what_a_server_does_not_take_is_left_out_and_known(chat: Chat, endpoint: Make) -> None:
    chat.faults = [server.refuses_field(name) for name in ("seed", "stop", "max_tokens")]
    chat.script = lambda request: "one END two"
    speaker = endpoint()
    assert speaker.generate(ASK, temperature=1.0, seed=1, stop=["END"]) == ["one"]
    assert speaker.dropped == {"seed", "stop", "max_tokens"}
    assert chat.asked[-1]["max_completion_tokens"] == 256
    assert speaker.account.ledger.spent().calls == 4


@pytest.mark.parametrize(
    "fault",
    [
        server.state(429),
        server.state(500),
        server.state(503),
        server.cut_off,
        server.not_json,
        *LATE,
        server.raw([]),
        server.raw({}),
        server.raw({"choices": []}),
        server.raw({"choices": [None]}),
        server.raw({"choices": [{"message": "text"}]}),
        server.raw(b"\xff\xfe not text"),
        server.raw(b"[" * 100_000),
    ],
)
def test_faults_that_pass_are_tried_again(chat: Chat, endpoint: Make, waits: list[float], fault: Any) -> None:
    chat.faults = [fault, fault]
    chat.script = lambda request: "fine"
    speaker = endpoint(timeout=0.3 if fault in LATE else 30)
    assert speaker.generate(ASK) == ["fine"]
    assert len(chat.asked) == 3
    assert 0.5 <= waits[0] <= 1
    assert 1 <= waits[1] <= 2
    spent = speaker.account.ledger.spent()
    assert (spent.calls, spent.failed) == (3, 2)


def test_the_server_says_how_long_to_wait(chat: Chat, endpoint: Make, waits: list[float]) -> None:
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    chat.faults = [server.state(429, Retry_After="7"), server.state(503, Retry_After=later)]
    endpoint().generate(ASK)
    assert waits[0] == 7
    assert 25 < waits[1] <= 30


def test_a_server_that_asks_for_too_much_patience_ends_it(chat: Chat, endpoint: Make, waits: list[float]) -> None:
    chat.faults = [server.state(429, Retry_After="4000")]
    with pytest.raises(SpeakerError, match="asks to wait 4000 s, and patience is 120 s"):
        endpoint().generate(ASK)
    assert waits == []


def test_after_the_last_try_there_is_one_line(chat: Chat, endpoint: Make, waits: list[float]) -> None:
    chat.faults = [server.state(500, "out of\nmemory")] * 9
    with pytest.raises(SpeakerError, match="tiny at http.*HTTP 500: out of memory, 3 times in a row") as error:
        endpoint(retries=2).generate(ASK)
    assert "\n" not in str(error.value)
    assert len(chat.asked) == 3


@pytest.mark.parametrize(
    ("number", "message", "says"),
    [
        (400, "the context is too long", "refuses the request .HTTP 400.: the context is too long"),
        (401, f"wrong key {KEY}", "refuses the key of OPENAI_API_KEY .HTTP 401."),
        (403, f"wrong key {KEY}", "refuses the key of OPENAI_API_KEY .HTTP 403."),
        (404, "no model tiny", "is not there .HTTP 404.: no model tiny; check model, and base_url"),
        (429, "insufficient_quota", "refuses the request .HTTP 429.: insufficient_quota"),
    ],
)
def test_what_no_further_try_mends_ends_at_once(
    chat: Chat, endpoint: Make, waits: list[float], number: int, message: str, says: str
) -> None:
    chat.faults = [server.state(number, message)]
    with pytest.raises(SpeakerError, match=says):
        endpoint().generate(ASK)
    assert len(chat.asked) == 1
    assert waits == []


def test_nobody_there(endpoint: Make, chat: Chat, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    speaker = endpoint(retries=1)
    chat.server.server_close()  # the socket is no longer listening
    with pytest.raises(SpeakerError, match="cannot be reached, 2 times in a row"):
        speaker.generate(ASK)
    assert speaker.account.ledger.spent().calls == 0  # nothing left this machine


def test_answers_that_are_none_are_counted(chat: Chat, endpoint: Make) -> None:
    chat.faults = [
        server.says(""),
        server.says(None),
        server.says(None, refusal="I will not"),
        server.says("half of", ends="content_filter"),
        server.says("I'm sorry, but I can't help with that."),
        server.says([{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]),
    ]
    speaker = endpoint()
    texts = [speaker.generate(ASK) for _ in range(6)]
    assert texts == [[], [], [], [], ["I'm sorry, but I can't help with that."], ["in parts"]]
    spent = speaker.account.ledger.spent()
    assert (spent.empty, spent.refused, spent.failed) == (2, 3, 0)


def test_requests_are_spread_as_the_rate_limit_says(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    now, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(round(seconds, 6))
        now[0] += seconds

    config = SpeakerConfig(model="tiny", base_url=chat.url, requests_per_minute=30)
    speaker = Endpoint(config, sleep=sleep, clock=lambda: now[0])
    for _ in range(3):
        speaker.generate(ASK, max_tokens=1)
    now[0] += 10
    speaker.generate(ASK, max_tokens=1)
    speaker.close()
    assert slept == [2, 2]
    assert chat.headers[0]["authorization"] == "Bearer none"


# ---- budgets ---------------------------------------------------------------------------------------------------------


def ask_often(speaker: Endpoint, **options: Any) -> None:
    for _ in range(100):
        speaker.generate(ASK, **options)


def test_calls_are_counted_at_the_server_and_never_exceed_the_budget(chat: Chat, endpoint: Make) -> None:
    chat.faults = [server.state(500), server.state(429)]
    speaker = endpoint(budget_calls=5)
    with pytest.raises(BudgetExceeded, match="role: the budget of 5 calls for tiny @ .* is used up: 5 are spent"):
        ask_often(speaker, max_tokens=2)
    assert len(chat.asked) == 5


@pytest.mark.parametrize("usage", [True, False])
@pytest.mark.parametrize("fault", [None, server.cut_off])
def test_tokens_and_money_at_the_server_never_exceed_the_budget(
    chat: Chat, endpoint: Make, usage: bool, fault: Any
) -> None:
    chat.usage = usage
    chat.script = lambda request: "one two three"
    chat.faults = [fault] * 2 if fault else []
    settings = {"budget_tokens": 700, "budget_money": 0.001, "price_in": 1.0, "price_out": 2.0}
    speaker = endpoint(**settings)
    with pytest.raises(BudgetExceeded):
        ask_often(speaker, n=2, temperature=1.0, max_tokens=8)
    really = [chat.choices(one) for one in chat.asked]
    assert len(really) > 1
    assert sum(asked + given for _, asked, given in really) <= 700
    assert sum(asked * 1.0 + given * 2.0 for _, asked, given in really) / 1e6 <= 0.001
    spent = speaker.account.ledger.spent()
    assert spent.tokens_in + spent.tokens_out <= 700
    assert spent.money == pytest.approx((spent.tokens_in + 2 * spent.tokens_out) / 1e6)


def test_nothing_is_asked_that_does_not_fit(chat: Chat, endpoint: Make) -> None:
    with pytest.raises(BudgetExceeded, match="tokens .* 0 are spent and the next request may take 1094"):
        endpoint(budget_tokens=1000).generate(ASK, max_tokens=1000)
    assert chat.asked == []


def test_a_question_longer_than_estimated_raises_later_estimates(chat: Chat, endpoint: Make) -> None:
    reply = {"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 500, "completion_tokens": 1}}
    chat.faults = [server.raw(reply)] * 9
    speaker = endpoint(budget_tokens=1100)
    with pytest.raises(BudgetExceeded):
        ask_often(speaker, max_tokens=10)
    assert len(chat.asked) == 2  # a third one could take 510 again


def test_threads_do_not_exceed_a_budget_together(chat: Chat, endpoint: Make) -> None:
    speaker = endpoint(budget_calls=4)
    with ThreadPoolExecutor(8) as pool:
        tried = [pool.submit(speaker.generate, user(f"cat {number}"), max_tokens=1) for number in range(12)]
    failed = [one for one in tried if one.exception() is not None]
    assert len(chat.asked) == 4
    assert len(failed) == 8
    assert all(isinstance(one.exception(), BudgetExceeded) for one in failed)


def test_roles_share_the_budget_of_their_model(chat: Chat, endpoint: Make) -> None:
    ledger = Ledger()
    one, other = (endpoint(ledger=ledger, role=role, budget_calls=3) for role in ("rewriter", "victim"))
    one.generate(ASK, max_tokens=1)
    other.generate(ASK, max_tokens=1)
    one.generate(ASK, max_tokens=1)
    with pytest.raises(BudgetExceeded, match="^victim: "):
        other.generate(ASK, max_tokens=1)
    assert {row["role"]: row["calls"] for row in ledger.rows()} == {"rewriter": 2, "victim": 1}


def test_a_budget_holds_over_a_restart_and_a_kill(chat: Chat, endpoint: Make, tmp_path: Path) -> None:
    journal = tmp_path / "spending.jsonl"
    settings = {"budget_tokens": 420}
    first = endpoint(ledger=Ledger(journal), **settings)
    first.generate(ASK, max_tokens=8)
    spent = first.account.ledger.spent()
    again = Ledger(journal)
    assert again.spent().as_dict() == spent.as_dict()
    first.account.reserve(94, 200)  # killed while it was asked
    with journal.open("ab") as stream:
        stream.write(b'{"kind": "cost", "id')
    third = endpoint(ledger=Ledger(journal), **settings)
    assert third.account.ledger.spent().tokens_out == spent.tokens_out + 200
    with pytest.raises(BudgetExceeded):
        third.generate(ASK, max_tokens=100)
    assert len(chat.asked) == 1
    third.generate(ASK, max_tokens=1)
    Ledger(journal)  # is whole again


# ---- cache -----------------------------------------------------------------------------------------------------------


def converse(speaker: Endpoint) -> list[list[str]]:
    said = [speaker.generate(user(f"the {word} sleeps"), max_tokens=4) for word in ("cat", "dog", "cat")]
    said += [speaker.generate(ASK, n=3, temperature=1.0, seed=seed, max_tokens=4) for seed in (1, 2)]
    return said + [speaker.generate(ASK, n=2, temperature=1.0, max_tokens=4) for _ in range(2)]


@pytest.mark.parametrize("takes_n", [True, False])
def test_a_second_run_asks_nothing_and_hears_the_same(
    chat: Chat, endpoint: Make, tmp_path: Path, takes_n: bool
) -> None:
    chat.takes_n = takes_n
    count = [0]

    def script(request: dict[str, Any]) -> str:
        count[0] += 1
        return f"answer {count[0]}"

    chat.script = script
    first = converse(endpoint(cache=tmp_path / "answers.sqlite"))
    assert first[0] == first[2] == ["answer 1"]
    assert len({text for texts in first for text in texts}) == 2 + 6 + 4
    asked = len(chat.asked)
    second = endpoint(cache=tmp_path / "answers.sqlite")
    assert converse(second) == first
    assert len(chat.asked) == asked
    spent = second.account.ledger.spent()
    assert (spent.calls, spent.hits) == (0, 13)


def test_every_part_of_a_question_matters(chat: Chat, endpoint: Make, tmp_path: Path) -> None:
    chat.script = lambda request: "fine"
    speaker = endpoint(cache=tmp_path / "answers.sqlite")
    ways: list[dict[str, Any]] = [
        {}, {"max_tokens": 9}, {"stop": ["."]}, {"temperature": 0.5, "seed": 1}, {"temperature": 0.6, "seed": 1},
        {"temperature": 0.6, "seed": 2}, {"temperature": 0.6, "seed": 2, "top_p": 0.5},
    ]  # fmt: skip
    for way in ways:
        speaker.generate(ASK, **way)
    speaker.generate(user("the cat sleeps", "be short"))
    assert len(chat.asked) == len(ways) + 1
    for way in ways:
        speaker.generate(ASK, **way)
    assert len(chat.asked) == len(ways) + 1


RUN = """
import sys
from pathlib import Path
from promptuary.speakers.base import SpeakerConfig, user
from promptuary.speakers.cache import Cache
from promptuary.speakers.endpoint import Endpoint
speaker = Endpoint(SpeakerConfig(model="tiny", base_url=sys.argv[1]), cache=Cache(Path(sys.argv[2])))
for number in range(int(sys.argv[3])):
    print(*speaker.generate(user(f"question {number}"), n=3, temperature=1.0, seed=number), flush=True)
speaker.close()
"""


def test_a_run_that_was_killed_pays_nothing_twice(chat: Chat, tmp_path: Path) -> None:
    """Without `n`, each of three answers is a request of its own: the kill comes between the second and the third."""
    chat.takes_n = False
    chat.script = lambda request: f"answer-{request['messages'][0]['content'][-1]}-{request['seed']}"
    command = [sys.executable, "-c", RUN, chat.url, str(tmp_path / "answers.sqlite"), "2"]
    done = threading.Event()

    def killed(handler: server.Handler, request: dict[str, Any]) -> bool:
        process.kill()
        process.wait()
        done.set()
        handler.close_connection = True
        return True

    chat.faults = [lambda *_: False] * 4 + [killed]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process:
        assert done.wait(60)
    answered = len(chat.asked) - 1
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout.splitlines() == [f"answer-{n}-{n} answer-{n}-{n + 1} answer-{n}-{n + 2}" for n in range(2)]
    seen = [(one["messages"][0]["content"], one["seed"]) for one in chat.asked]
    assert len(chat.asked) == answered + 1 + 2  # the answer that the kill took, and the one behind it
    assert len(set(seen)) == len(seen) - 1


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_is_nowhere(
    chat: Chat,
    endpoint: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx2", "httpcore2"):
        caplog.set_level(logging.DEBUG, logger=name)
    told = []
    chat.script = lambda request: f"your key is {KEY}"
    speaker = endpoint(cache=tmp_path / "answers.sqlite", ledger=Ledger(tmp_path / "spending.jsonl"), retries=1)
    told += speaker.generate(ASK)
    for fault in (server.state(401, KEY), server.state(400, KEY), server.state(500, KEY), server.cut_off):
        chat.faults = [fault] * 2
        with pytest.raises(SpeakerError) as error:
            speaker.generate(user("again"))
        told += [str(error.value), repr(error.value), "".join(traceback.format_exception(error.value))]
        assert error.value.__context__ is None
    told += [repr(speaker), speaker.name, str(speaker.config), speaker.config.model_dump_json(), str(speaker.identity)]
    told += [str(speaker.account.ledger.rows())]
    speaker.close()
    told += [caplog.text, *capfd.readouterr()]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 2
    assert told[0] == "your key is ***"
    assert any("HTTP Request" in one or "Sending HTTP" in one for one in told)  # the logs were on
    assert not [one for one in told if KEY in one]
    assert not [one for one in written if KEY.encode() in one]


@pytest.mark.parametrize("key", ["two words", "schlüssel", "line\nbreak"])
def test_what_is_no_key_is_refused_without_being_shown(chat: Chat, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(ConfigError, match="the environment variable MY_KEY holds no key") as error:
        Endpoint(SpeakerConfig(model="tiny", base_url=chat.url, api_key_env="MY_KEY"))
    assert key not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"api_key_env": KEY}, "s.api_key_env: expected the NAME of an environment variable in capitals"),
        ({"api_key": KEY}, "unknown field s.api_key"),
        ({"base_url": f"https://me:{KEY}@host/v1"}, "without user, key"),
        ({"base_url": f"https://host/v1?key={KEY}"}, "without user, key"),
        ({"base_url": "localhost:8000"}, "expected an address such as"),
        ({"budget_money": 1.0}, "budget_money needs price_in and price_out"),
    ],
)
def test_settings_that_are_wrong_are_refused_without_a_key_in_the_message(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        SpeakerConfig.read({"model": "tiny", **settings}, where="s")
    assert KEY not in str(error.value)
