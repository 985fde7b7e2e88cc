"""Judged answers on tiny models: what is drawn follows from seeds, rewards equal a slow loop, runs end to end.

Knows no oracle but the task's own arithmetic.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import promptuary
import styles
import tiny
import toy
from promptuary import judging
from promptuary.answering import Answerer, Question
from promptuary.building import open_backbone
from promptuary.checkpoint import load_prompt
from promptuary.config import load_run
from promptuary.course import Course
from promptuary.errors import ConfigError, FingerprintError, Interrupted, NotFoldable, PromptuaryError
from promptuary.evaluation import evaluate
from promptuary.listening import Listener
from promptuary.tasks.transfer import Transfer
from promptuary.training import train
from promptuary.training_state import snapshot
from promptuary.tuned import Tuned
from promptuary.wording import Wording


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("styles")


@pytest.fixture(scope="module")
def tuned(where: Path) -> Tuned:
    run: Any = load_run(styles.settings(where, task={"held_out": str(where / "held")}))
    return Course(run, open_backbone(run.backbone)).learner


@pytest.fixture
def wording(tuned: Tuned) -> Wording:
    return Wording(tuned, styles.sentences(3), seed=5)


def asked(tuned: Tuned, text: str, number: int = 0) -> Question:
    example = styles.sentences(3)[number]
    said = tuned.saying(text)
    return Question(Answerer.of(said), said.asking.row(example, 0, labelled=True), example)


# ---- what is drawn --------------------------------------------------------------------------------------------------


def test_answers_follow_from_the_seed_and_leave_the_generator_of_torch_alone(tuned: Tuned) -> None:
    before = torch.get_rng_state()
    found = judging.drawn(asked(tuned, "good"), 6, 1)
    assert found == judging.drawn(asked(tuned, "good"), 6, 1)
    assert found != judging.drawn(asked(tuned, "good"), 6, 2)
    assert len(set(found)) > 1
    assert torch.equal(torch.get_rng_state(), before)


def test_to_stop_where_all_answers_have_ended_changes_none_of_them(
    tuned: Tuned, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, task = asked(tuned, "good"), tuned.task
    whole = judging.drawn(one, 4, 1, ended=False)
    assert judging.drawn(one, 4, 1) == whole
    # so that all of them end soon
    monkeypatch.setattr(type(task), "ends", "aeiou")
    lengths = list[int]()
    written = judging.texts

    def counted(*given: Any, **options: Any) -> list[str]:
        found = written(*given, **options)
        lengths.append(max(len(text.split()) for text in found))
        return found

    monkeypatch.setattr(judging, "texts", counted)
    monkeypatch.setattr(tuned.judging, "_ends", {})
    judging.drawn(one, 4, 1)
    judging.drawn(one, 4, 1, ended=False)
    assert lengths[0] < lengths[1]


def test_only_the_likeliest_tokens_are_drawn(where: Path, tuned: Tuned) -> None:
    one = asked(tuned, "good")
    task: Any = tuned.task
    narrow = task.config.model_copy(update={"top_k": 1})
    other = tuned.saying("good")
    other._asking = promptuary.asking.Asking(tuned.backbone, Transfer(narrow), tuned.max_length, tuned.method.words_at)  # type: ignore[union-attr]
    (first, *rest) = judging.drawn(Question(Answerer.of(other), one.row, one.example), 5, 3)
    assert rest == [first] * 4


def test_an_answer_is_as_long_as_its_source_allows(tuned: Tuned) -> None:
    row = asked(tuned, "good").row
    tokens = len(styles.sentences(3)[0]["text"].split())
    assert row.writes == tokens + 10
    assert tuned.answer_positions(row) == tokens + 10
    assert all(len(text.split()) <= tokens + 10 for text in judging.drawn(asked(tuned, "good"), 8, 1))


# ---- what it is worth -----------------------------------------------------------------------------------------------


def states_of(tuned: Tuned, text: str) -> Tensor:
    """One text at a time, straight from the encoder."""
    task: Any = tuned.task
    encoder = tuned.judging._encoder(task.settings.content)
    ids = torch.tensor([[*encoder.prefix, *encoder.text.plain_ids(text), *encoder.suffix]])
    with torch.no_grad():
        states = encoder.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    inside = slice(len(encoder.prefix), ids.shape[1] - len(encoder.suffix))
    return states[inside]


def test_rewards_equal_a_slow_loop(tuned: Tuned) -> None:
    task: Any = tuned.task
    source, written = "red cat sleeps .", ["blue dog .", "cat", "red cat sleeps .", "not good but bad ?", "cat"]
    found = task.rewards(tuned.judging, source, written)
    classifier = load_prompt(task.settings.style)
    for text, one in zip(written, found, strict=True):
        a, b = states_of(tuned, text), states_of(tuned, source)
        cosine = torch.stack([torch.stack([torch.cosine_similarity(x, y, dim=0) for y in b]) for x in a])
        p, r = float(cosine.max(1).values.mean()), float(cosine.max(0).values.mean())
        content = 100 * max(0.0, 2 * p * r / (p + r))
        style = 100 * classifier.predict([text])[0].scores["happy"]
        assert one["content"] == pytest.approx(content, abs=1e-3)
        assert one["wanted"] == pytest.approx(style, abs=1e-3)
        assert one["reward"] == pytest.approx((content + style) / 2, abs=1e-3)
    assert found[2]["content"] == pytest.approx(100, abs=1e-3)


def test_a_reward_is_the_mean_of_the_maxima_of_consecutive_groups(tuned: Tuned, wording: Wording) -> None:
    tried = wording.tried(["good", "bad dog"], wording.examples, draw=2)
    assert tried.maxima is not None
    assert tried.maxima.shape == (2, 3, 2)
    assert torch.equal(tried.reward, tried.maxima.mean(-1))
    source = wording.examples[1]["text"]
    seed = promptuary.seeds.seeded(5, 12, 2, 1, judging.mark(source)).initial_seed()
    written = judging.drawn(asked(tuned, "bad dog", 1), 8, seed)
    task: Any = tuned.task
    own = [one["reward"] for one in task.rewards(tuned.judging, source, written)]
    assert tried.maxima[1, 1].tolist() == pytest.approx([max(own[:4]), max(own[4:])])


def test_rewards_follow_from_seed_and_draw_and_are_never_remembered(tuned: Tuned, wording: Wording) -> None:
    first = wording.tried(["good"], wording.examples, draw=0)
    runs = wording.runs
    assert runs == 3 * 8
    again = wording.tried(["good", "good"], wording.examples, draw=0)
    assert wording.runs == runs + 2 * 3 * 8
    assert wording._known == {}
    # the same place of the same draw is the same, another place or draw is another sample
    assert torch.equal(again.reward[0], first.reward[0])
    assert not torch.equal(again.reward[1], first.reward[0])
    assert not torch.equal(wording.tried(["good"], wording.examples, draw=1).reward, first.reward)
    other = Wording(tuned, wording.examples, seed=6)
    assert not torch.equal(other.tried(["good"], wording.examples, draw=0).reward, first.reward)
    # an example's samples do not depend on those beside it
    assert torch.equal(wording.tried(["good"], wording.examples[2:], draw=0).reward[:, 0], first.reward[:, 2])


def test_a_prompt_that_does_not_fit_is_worth_minus_infinity(wording: Wording) -> None:
    tried = wording.tried(["good", "very " * 200], wording.examples[:1])
    assert tried.reward[0].isfinite().all()
    assert tried.reward[1].tolist() == [-torch.inf]


# ---- in use ---------------------------------------------------------------------------------------------------------


def test_the_answer_in_use_is_the_best_of_its_draws_and_depends_on_nothing_beside_it(tuned: Tuned) -> None:
    texts = [example["text"] for example in styles.sentences(3)]
    said = tuned.saying("good")
    whole = said.predict(texts)
    assert [one.answer for one in said.predict(texts[::-1], batch_size=1)[::-1]] == [one.answer for one in whole]
    task: Any = tuned.task
    seed = promptuary.seeds.seeded(0, 13, judging.mark(texts[0])).initial_seed()
    written = judging.drawn(asked(tuned, "good"), 4, seed)
    rewards = [one["reward"] for one in task.rewards(tuned.judging, texts[0], written)]
    assert whole[0].answer == written[rewards.index(max(rewards))]
    assert whole[0].scores["reward"] == pytest.approx(max(rewards))
    assert set(whole[0].scores) == {"reward", "content", "wanted", "style"}


def test_evaluation_measures_what_the_judges_say_with_an_interval(tuned: Tuned) -> None:
    found = evaluate(tuned.saying("good"), styles.sentences(3))
    assert list(found.scores) == ["reward", "content", "style", "joint", "geometric_mean"]
    mean = sum(one.scores["reward"] for one in found.predictions) / 3
    assert found.scores["reward"] == pytest.approx(mean)
    assert found.interval is not None
    assert found.interval[0] <= mean <= found.interval[1]
    assert found.gold == [example["text"] for example in styles.sentences(3)]


def test_a_classifier_on_the_same_base_shares_it_and_another_one_does_not(tuned: Tuned) -> None:
    task: Any = tuned.task
    tuned.judging.labels(task.settings.style)
    tuned.judging.labels(task.settings.held_out)
    own, other = (
        tuned.judging._classifiers[folder].backbone for folder in (task.settings.style, task.settings.held_out)
    )
    assert own is tuned.backbone
    assert other is not tuned.backbone


# ---- a whole run ----------------------------------------------------------------------------------------------------


def test_a_run_end_to_end_is_saved_and_answers_alike_when_it_is_loaded(where: Path) -> None:
    task = {"held_out": str(where / "held"), "fluency": str(where / "fluent")}
    result = train(load_run(styles.settings(where, task=task, out=str(where / "whole"))))
    assert set(result.metrics) == {"reward", "content", "style", "joint", "geometric_mean", "fluency"}
    steps = [row for row in toy.metric_rows(result.dir) if "parts" in row]
    assert len(steps) == 2
    assert all(0 < row["parts"]["reward"] <= 100 for row in steps)
    assert all(row["parts"]["value"] < 0 for row in steps)  # ln 109 - 10
    text = result.facts["text"]
    assert text == result.prompt.text
    validated = [row for row in toy.metric_rows(result.dir) if row.get("split") == "validation"]
    assert max(validated, key=lambda row: row["reward"])["text"] == text
    rows = [json.loads(line) for line in (result.dir / "predictions.jsonl").read_text().splitlines()]
    loaded = load_prompt(result.dir)
    found = loaded.predict([row["gold"] for row in rows])
    assert [one.answer for one in found] == [row["answer"] for row in rows]


class Stopping(Listener):
    """Asks for a stop behind a step."""

    def __init__(self, stop: Any, behind: int) -> None:
        self.stop, self.behind = stop, behind

    def stepped(self, row: Any) -> None:
        if row["step"] == self.behind:
            self.stop.request()


def test_a_stopped_run_goes_on_exactly(where: Path) -> None:
    whole = train(load_run(styles.settings(where, out=str(where / "one"))))
    run, stop = load_run(styles.settings(where, out=str(where / "two"))), promptuary.training.Stop()
    with pytest.raises(Interrupted):
        train(run, listener=Stopping(stop, 1), stop=stop)
    again = train(run, resume=True)

    def parts(folder: Path) -> list[Any]:
        return [row["parts"] for row in toy.metric_rows(folder) if "parts" in row]

    assert parts(again.dir) == parts(whole.dir)
    assert again.facts["text"] == whole.facts["text"]
    assert again.metrics == whole.metrics


def test_each_prompt_is_scored_on_one_row_where_they_are_dealt_out(where: Path) -> None:
    run: Any = load_run(styles.settings(where, out=str(where / "dealt")))
    training = promptuary.training.Training(run, Listener())
    words: Any = training.solver.words  # type: ignore[attr-defined]
    training.step(training.feed.at(0))
    # 4 prompts of 8 samples each, whatever rows there are
    assert words.runs == 4 * 8
    assert snapshot(training.tuned, training.solver) is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"style_label": "hapy"}}, r'task.style_label: .* has no label "hapy"; did you mean "happy"'),
        ({"task": {"style": "/nowhere"}}, "task.style: /nowhere"),
        ({"task": {"content": "/nowhere"}}, "task.content: "),
        ({"method": {"name": "prompt_tuning"}, "solver": {"name": "gradient"}}, "no right answers to learn from"),
        ({"solver": {"rows": "all"}}, "dealt: prompts are dealt out to the rows of a batch; use rows: batch"),
        ({"solver": {"prompts": 2}, "train": {"steps": 1, "batch_size": 4}}, "2 prompts are fewer than the 4 rows"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(where: Path, changes: dict[str, Any], message: str) -> None:
    values = styles.settings(where, **{**changes, "out": str(where / "wrong")})
    if changes.get("solver", {}).get("name") == "gradient":
        values["solver"] = {"name": "gradient"}
    with pytest.raises(PromptuaryError, match=message) as caught:
        train(load_run(values), fresh=True)
    assert "\n" not in str(caught.value)


def test_a_judge_tells_labels_of_one_text_apart(where: Path) -> None:
    pair = where / "pair"
    styles.classifier(pair, str(where / "other"), template="{text} and {more} it was {mask}")
    with pytest.raises(ConfigError, match=r"task.style: .*pair does not tell labels of a single text apart"):
        train(load_run(styles.settings(where, task={"style": str(pair)}, out=str(where / "wrong"))), fresh=True)


# ---- a prompt for each input ----------------------------------------------------------------------------------------


def each(where: Path, name: str, **changes: Any) -> dict[str, Any]:
    solver = {"per_input": True, "model": str(where / "other"), "learning_rate": 0.05}
    return styles.settings(where, solver=solver, out=str(where / name), **changes)


def test_a_policy_that_writes_for_each_input_is_saved_and_goes_on_writing(where: Path) -> None:
    result = train(load_run(each(where, "each")))
    rows = [json.loads(line) for line in (result.dir / "predictions.jsonl").read_text().splitlines()]
    loaded = load_prompt(result.dir)
    found = loaded.predict([row["gold"] for row in rows])
    assert [(one.answer, one.prompt) for one in found] == [(row["answer"], row["prompt"]) for row in rows]
    # what it writes for an input is what its policy finds likeliest behind that
    speaking = loaded.speaking
    assert speaking is not None
    ids = speaking.policy.voice.ids(rows[0]["gold"])
    spoken = speaking.policy.speak([ids]).ids[0].tolist()
    assert found[0].prompt == speaking.policy.text(spoken)
    assert loaded.spoken is not None
    assert loaded.spoken.model == str(where / "other")
    assert loaded.text is None
    assert loaded.trainable_parameters == 2 * 16 * 32 + 16 + 32
    assert "text" not in result.facts
    assert "writes 2 tokens for each input" in (result.dir / "prompt" / "README.md").read_text()


def test_it_has_no_single_prompt(where: Path) -> None:
    loaded = load_prompt(where / "each")
    with pytest.raises(NotFoldable, match="depends on the input"):
        loaded.method.fold()  # type: ignore[union-attr]
    with pytest.raises(NotFoldable, match="for each input"):
        loaded.prompt(loaded.backbone.probe())
    assert loaded.added_tokens == 2
    said = loaded.saying("good")
    assert said.text == "good"
    assert said.predict(["red cat"])[0].prompt is None


def test_the_policy_of_the_best_validation_is_the_one_that_is_tested(where: Path) -> None:
    run = load_run(each(where, "best", train={"steps": 3, "batch_size": 2, "evaluate_every": 1}))
    training = promptuary.training.Training(run, Listener())
    result = training.run(resume=False, fresh=False)
    held = result.prompt.method.policy_weights  # type: ignore[union-attr]
    for place, one in enumerate(held):
        assert torch.equal(one, training.best_state[f"method.policy_weights.{place}"])
        # the solver and the prompt hold the same tensors
        assert one is training.solver.policy.weights[place]  # type: ignore[attr-defined]


def test_such_a_run_goes_on_exactly_after_a_stop(where: Path) -> None:
    whole = train(load_run(each(where, "each one")))
    run, stop = load_run(each(where, "each two")), promptuary.training.Stop()
    with pytest.raises(Interrupted):
        train(run, listener=Stopping(stop, 1), stop=stop)
    again = train(run, resume=True)
    assert again.metrics == whole.metrics
    for one, other in zip(again.prompt.state().values(), whole.prompt.state().values(), strict=True):
        assert torch.equal(one, other)
    # and a finished one is read as it was written
    read = train(run, resume=True)
    assert read.prompt.predict(["red cat"]) == again.prompt.predict(["red cat"])


def test_a_voice_that_is_another_model_is_refused(where: Path, tmp_path: Path) -> None:
    shutil.copytree(where / "other", tmp_path / "kept")
    loaded = load_prompt(where / "each")
    try:
        shutil.rmtree(where / "other")
        tiny.save(where / "other", "causal", seed=9)
        with pytest.raises(FingerprintError, match="was trained on"):
            loaded.predict(["red cat"])
    finally:
        shutil.rmtree(where / "other")
        shutil.copytree(tmp_path / "kept", where / "other")


def test_only_a_method_with_a_policy_is_written_for_each_input(where: Path) -> None:
    with pytest.raises(ConfigError, match="method manual has one prompt for all inputs"):
        train(load_run({**each(where, "manual"), "method": {"name": "manual"}}), fresh=True)
