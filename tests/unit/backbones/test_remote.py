from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import promptuary
import speaking_server as server
from promptuary import registry
from promptuary.backbones.base import BackboneConfig
from promptuary.backbones.remote import FAR, Remote, byte_tokenizer, label_scores
from promptuary.building import build_method, open_backbone
from promptuary.config import build
from promptuary.data.collate import collate
from promptuary.errors import BudgetExceeded, ConfigError, SiteError
from promptuary.report.matrix import UNREAD, by_class
from promptuary.tuned import Tuned
from promptuary.types import Piece, Prompt
from promptuary.wording import Wording
from speaking_server import KEY, Chat, chatting

LABELS = {"bad": "negative", "good": "positive"}


@pytest.fixture
def chat() -> Iterator[Chat]:
    with chatting() as running:
        yield running


@pytest.fixture
def remote(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Remote]]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    opened = []

    def make(**settings: Any) -> Remote:
        config = {"model": "tiny", "family": "remote", "endpoint": {"base_url": chat.url, **settings}}
        made = open_backbone(BackboneConfig.read(config, where="backbone"))
        assert isinstance(made, Remote)
        opened.append(made)
        return made

    yield make
    for one in opened:
        one.release()


def task(**settings: Any) -> Any:
    kind = registry.load("tasks", settings.pop("name", "classify"))
    given = {"template": "Review: {text} It was {mask}", "labels": LABELS} if kind.name == "classify" else {}
    return kind(kind.Config.read({**given, **settings}, where="task"))


def oracle(request: dict[str, Any]) -> str:
    """Right, in a sentence, if the system message asks for care; else always positive."""
    said = {one["role"]: one["content"] for one in request["messages"]}
    careful = "careful" in said.get("system", "")
    return f"It is {'negative' if careful and 'awful' in said['user'] else 'positive'}."


EXAMPLES = [{"text": "an awful film", "label": "bad"}, {"text": "a fine film", "label": "good"}] * 3


@pytest.mark.parametrize("text", ["plain", "größer als 3 €, 🙂", " two  spaces \n", "<|end|> and <|pad|>", ""])
def test_any_text_is_its_bytes(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_a_model_behind_an_endpoint_is_evaluated_like_any_other(chat: Chat, remote: Callable[..., Remote]) -> None:
    chat.script = oracle
    found = promptuary.evaluate(Tuned(remote(), task()), EXAMPLES)
    assert found.scores["accuracy"] == 0.5
    assert {one["messages"][0]["content"] for one in chat.asked} == {
        "Review: an awful film It was", "Review: a fine film It was"
    }  # fmt: skip
    assert len(chat.asked) == 2  # equal questions are asked once in a batch
    assert chat.asked[0]["temperature"] == 0


def test_texts_are_not_cut_as_if_bytes_were_tokens(remote: Callable[..., Remote]) -> None:
    backbone = remote()
    whole = backbone.encode([Piece("fixed", "x" * 900)], 256)
    assert (len(whole.ids), whole.cut) == (900, 0)
    cut = backbone.encode([Piece("field", "ü" * 30)], 10)
    assert backbone.spelt(cut.ids) == "ü" * 20
    assert backbone.spelt(cut.ids[:-1]) == "ü" * 19  # half a character is left out


def asked(backbone: Remote, rows: list[Any], prompts: Any, **more: Any) -> list[Any]:
    batch = collate(rows, backbone.pad, segments=False, sight=None)
    return backbone.conversations(replace(batch, **more), prompts)


def test_words_before_everything_are_the_system_message(remote: Callable[..., Remote]) -> None:
    backbone = remote()
    rows = Tuned(backbone, task()).rows(EXAMPLES[:2], labelled=False)
    words = Prompt(text="Be careful.")
    assert asked(backbone, rows, words)[0] == (
        {"role": "system", "content": "Be careful."}, {"role": "user", "content": "Review: an awful film It was"}
    )  # fmt: skip
    assert asked(backbone, rows, Prompt(text=""))[1] == ({"role": "user", "content": "Review: a fine film It was"},)
    several = [words, Prompt(text="Other.")]
    mixed = asked(backbone, rows, several, prompt_index=torch.tensor([1, 0]))
    assert [one[0]["content"] for one in mixed] == ["Other.", "Be careful."]


def test_words_elsewhere_stand_in_the_question(remote: Callable[..., Remote]) -> None:
    backbone = remote()
    rows = Tuned(backbone, task(template="Review: {text} {prompt} It was {mask}")).rows(EXAMPLES[:2], labelled=False)
    ids = torch.tensor(byte_tokenizer()(" Be careful.", add_special_tokens=False).input_ids)
    said = asked(backbone, rows, Prompt(text="Be careful.", ids=ids))
    assert [one["role"] for one in said[0]] == ["user"]
    assert " ".join(said[0][0]["content"].split()) == "Review: an awful film Be careful. It was"


def test_prompts_of_vectors_are_refused_in_one_line(chat: Chat, remote: Callable[..., Remote]) -> None:
    backbone = remote()
    rows = Tuned(backbone, task()).rows(EXAMPLES[:2], labelled=False)
    with pytest.raises(SiteError, match="the prompt uses input, and only words reach tiny behind its endpoint"):
        asked(backbone, rows, Prompt(rows=torch.zeros(1, 2, 1)))
    with pytest.raises(SiteError, match="gives no states"):
        backbone.hidden(collate(rows, backbone.pad, segments=False, sight=None), Prompt())
    assert chat.asked == []


def test_probabilities_of_the_first_tokens_are_the_scores(chat: Chat, remote: Callable[..., Remote]) -> None:
    """The tiny model's vocabulary is words, so the labels that it is likeliest to say are read off exactly."""
    tuned = Tuned(remote(), task(template="{text} {mask}"))
    prompt = {"messages": [{"role": "user", "content": "a big fish"}], "max_tokens": 1}
    tops = chat.model.answer(prompt, 0)[3]
    (first, best), (second, next_) = [(token, value) for token, value in tops if token.isalpha()][:2]
    words = task(template="{text} {mask}", labels={"x": second, "y": first})
    tuned = Tuned(tuned.backbone, words)
    chat_one = server.says(f"{first}.")

    def with_tops(handler: server.Handler, request: dict[str, Any]) -> bool:
        assert request["logprobs"] is True
        whole = handler.whole({**request, "max_tokens": 1})
        whole["choices"][0]["message"]["content"] = f"{first}."
        return handler.send(200, whole)

    chat.faults = [with_tops]
    (answer,) = tuned.predict(["a big fish"])
    assert answer.answer == "y"
    assert answer.scores["x"] / answer.scores["y"] == pytest.approx(math.exp(next_ - best), rel=1e-4)
    chat.faults = [chat_one]
    (plain,) = tuned.predict(["a big fish"])
    assert plain.scores["y"] == pytest.approx(1 / (1 + math.exp(FAR)), rel=1e-4)


def test_scores_put_the_answer_first_whatever_the_first_tokens_are() -> None:
    words = ["negative", "positive"]
    assert label_scores(1, words, [("The", -0.1), (" negative", -3.0)]) == [FAR, 0.0]
    tops = [(" pos", math.log(0.5)), ("Positive", math.log(0.2)), ("neg", math.log(0.2)), ("!", math.log(0.1))]
    assert label_scores(1, words, tops) == pytest.approx([math.log(0.2), math.log(0.7)])
    assert label_scores(1, words, tops[:2]) == pytest.approx([math.log(0.2), math.log(0.7)])  # the least that is told
    assert label_scores(0, ["a", "ab"], [("a", -0.1)]) == [0.0, FAR]  # begins both


def test_answers_that_are_no_label_are_wrong_and_are_counted(chat: Chat, remote: Callable[..., Remote]) -> None:
    chat.faults = [server.says("no idea"), server.says(""), server.says("I'm sorry, but I can't do that.")]
    backbone = remote(parallel=1)
    found = Tuned(backbone, task()).predict(["one", "two", "three"])
    assert [one.answer for one in found] == [""] * 3
    assert [one.scores for one in found] == [{"bad": 0.0, "good": 0.0}] * 3
    reader = backbone.reader
    assert (reader.asked, reader.unparsed, reader.empty, reader.refused) == (3, 1, 1, 1)


def test_no_label_is_wrong_whatever_the_right_one_is(chat: Chat, remote: Callable[..., Remote]) -> None:
    """The first of the labels has no advantage; scores, rewards and the report go on."""
    chat.script = lambda request: "no idea" if "awful" in request["messages"][-1]["content"] else "positive"
    method = build_method(registry.load("methods", "manual").Config(), remote().shape)
    tuned = Tuned(remote(), task(metrics=["accuracy", "macro_f1", "f1", "matthews"]), method)
    found = promptuary.evaluate(tuned, EXAMPLES)
    assert found.scores["accuracy"] == 0.5
    assert found.scores["macro_f1"] == 0.5  # of "bad" 0, of "good" 1; no label is no class of its own
    assert all(math.isfinite(value) for value in found.scores.values())
    assert [row["answer"] for row in found.rows()[:2]] == ["", "good"]
    tried = Wording(tuned, EXAMPLES, EXAMPLES).tried(["", "say it"], EXAMPLES[:2])
    # what is no label is no worse than a tie, and no better
    assert tried.reward.tolist() == [[0.0, pytest.approx(1.0)]] * 2
    assert tried.score.tolist() == [[0.0, 1.0]] * 2
    classes = by_class(found.gold, [one.answer for one in found.predictions], list(LABELS))
    assert (classes.count, classes.without) == (2, 0)
    assert [(one.true, one.given, one.count) for one in classes.confusions] == [("bad", UNREAD, 3)]
    chooser = registry.load("tasks", "choose")
    choose = chooser(chooser.Config.read({"template": "{question}", "fields": ["question"]}, where="task"))
    asked = {"question": "An awful", "choices": ["red", "blue"]}
    (none,) = Tuned(remote(), choose).predict([asked])
    assert (none.answer, set(none.scores.values())) == ("", {0.0})


def test_choices_of_each_example_are_scored(chat: Chat, remote: Callable[..., Remote]) -> None:
    chat.script = lambda request: "the red one" if "apple" in request["messages"][0]["content"] else "blue"
    kind = registry.load("tasks", "choose")
    chooser = kind(kind.Config.read({"template": "{question}", "fields": ["question"]}, where="task"))
    choices = ["red", "blue", "green"]
    rows = [{"question": "An apple is", "choices": choices}, {"question": "The sky is", "choices": choices[:2]}]
    assert [one.answer for one in Tuned(remote(), chooser).predict(rows)] == ["red", "blue"]


def test_written_answers(chat: Chat, remote: Callable[..., Remote]) -> None:
    chat.script = lambda request: f"so {request['messages'][0]['content'].upper()} ü"
    backbone = remote()
    writer = Tuned(backbone, task(name="generate", template="{text}", target="answer", max_new_tokens=9))
    assert [one.answer for one in writer.predict(["a", "b"])] == ["so A ü", "so B ü"]
    assert chat.asked[0]["max_tokens"] == 9
    chat.faults = [server.says("")]
    assert writer.predict(["c"])[0].answer == ""
    batch = writer.batch(writer.rows([{"text": "d"}], labelled=False))
    backbone.generate(batch, Prompt(), max_new_tokens=3, do_sample=True, temperature=0.7)
    assert chat.asked[-1]["temperature"] == 0.7
    with pytest.raises(SiteError, match="an endpoint has no num_beams"):
        backbone.generate(batch, Prompt(), max_new_tokens=3, num_beams=2)


def test_a_budget_ends_an_evaluation_and_the_cache_makes_the_next_one_free(
    chat: Chat, remote: Callable[..., Remote], tmp_path: Path
) -> None:
    chat.script = oracle
    examples = [{"text": f"film {number}", "label": "good"} for number in range(12)]
    cache = str(tmp_path / "answers.sqlite")
    with pytest.raises(BudgetExceeded, match="task: the budget of 5 calls"):
        promptuary.evaluate(Tuned(remote(budget_calls=5, cache=cache), task()), examples)
    assert len(chat.asked) == 5
    for _ in range(2):
        found = promptuary.evaluate(Tuned(remote(budget_calls=7, cache=cache), task()), examples)
        assert found.scores["accuracy"] == 1
        assert len(chat.asked) == 12


def test_what_tells_it_from_others_is_its_name_and_address(chat: Chat, remote: Callable[..., Remote]) -> None:
    one = remote()
    assert one.identity == remote(timeout=5).identity
    assert chat.url in one.identity.values()
    assert KEY not in str(one.identity)
    assert one.notes() == []
    assert one.max_positions is None
    assert not one.differentiable


def run(**backbone: Any) -> Any:
    data = {"source": "demo"}
    values = {"task": {"name": "classify"}, "data": data, "method": {"name": "prompt_tuning"}, "backbone": backbone}
    return build(values)


def test_settings_of_other_families_are_written_as_before(chat: Chat) -> None:
    plain = run(model="m")
    assert "endpoint" not in plain.model_dump()["backbone"]
    assert "endpoint" not in plain.to_yaml()
    assert run(model="m", endpoint=None).hash() == plain.hash()


def test_a_run_may_go_on_with_a_larger_budget_and_is_another_at_another_endpoint(chat: Chat) -> None:
    one, patient, other = (
        run(model="m", family="remote", endpoint={"base_url": url, **more})
        for url, more in ((chat.url, {}), (chat.url, {"budget_calls": 9, "timeout": 3}), ("http://host/v1", {}))
    )
    assert one.hash() == patient.hash() != other.hash()
    assert "budget_calls: 9" in patient.to_yaml()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"family": "remote"}, "endpoint.base_url: a remote model needs the address of its endpoint"),
        ({"family": "remote", "endpoint": {}}, "endpoint.base_url: a remote model needs"),
        ({"endpoint": {"base_url": "http://host/v1"}}, 'only the remote family has one, and the family is "auto"'),
        ({"family": "remote", "endpoint": {"base_uri": "x"}}, "unknown field backbone.endpoint.base_uri; did"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        BackboneConfig.read({"model": "m", **settings}, where="backbone")
