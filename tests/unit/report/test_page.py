"""The page as a whole: what it says, that it is whole by itself, that nothing in it is run, how large it may become.

Knows no command line.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from promptuary import registry
from promptuary.errors import DataError
from promptuary.evaluation import Evaluation, evaluate
from promptuary.report import page
from promptuary.testing import case_of, tiny_eyes
from promptuary.tuned import Tuned
from promptuary.types import Prediction

ABOUT = page.About("runs/one/prompt", "data/pets", "test")
VOID = {"meta", "img"}
EVIL = "<script>alert(1)</script>"


class Reader(HTMLParser):
    """Every tag and attribute, the text between, and whether all that is opened is closed."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(content.decode())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += " " + data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def text_tuned(folder: Path, **settings: Any) -> Tuned:
    """Prompt tuning on a masked model with a task of its own."""
    case = case_of(registry.load("methods", "prompt_tuning"), "masked", folder)
    whole = case.tuned()
    task = registry.load("tasks", "classify")
    made = task(task.Config.read({"template": "{text} it was {mask}", **settings}, where="task"))
    return Tuned(whole.backbone, made, whole.method, max_length=40)


def seeing_tuned(folder: Path, labels: Sequence[str]) -> Tuned:
    """VPT with a head on a tiny ViT."""
    whole = case_of(registry.load("methods", "vpt"), "vision", folder).tuned()
    task = registry.load("tasks", "classify")
    made = task(task.Config.read({"image": "image", "labels": list(labels), "reading": "head"}, where="task"))
    return Tuned(whole.backbone, made, whole.method)


def said(gold: Sequence[str], answers: Sequence[str], labels: Sequence[str], **scores: float) -> Evaluation:
    """An evaluation with these answers, each with a probability of 0.9."""
    rest = 0.1 / (len(labels) - 1)
    predictions = [Prediction(one, {label: 0.9 if label == one else rest for label in labels}) for one in answers]
    return Evaluation(scores or {"accuracy": 0.5}, predictions, list(gold), (0.25, 0.75), 8)


def test_a_text_task_shows_scores_classes_confusions_and_texts(tmp_path: Path) -> None:
    tuned = text_tuned(tmp_path, labels={"positive": "good", "negative": "bad"})
    examples = [{"text": f"the {word} cat", "label": "positive"} for word in ("red", "blue", "old")]
    found = said(["positive"] * 3, ["positive", "negative", "negative"], ["positive", "negative"], accuracy=1 / 3)
    read = Reader(page.render(ABOUT, found, tuned, examples, notes=["2 rows were left out"]))
    for part in (
        "Accuracy 33.3 %",
        "95 % interval: 25.0 to 75.0 %",
        "positive 1 of 3 33.3 % negative 2",
        "1 of 2 classes have no example here",
        "positive → negative 2 66.7 %",
        "the blue cat",
        "True positive 10.0 % Given negative 90.0 %",
        "Right positive 90.0 %",
        "2 rows were left out",
        "runs/one/prompt",
        "data/pets",
        "3 test",
        "prompt_tuning",
    ):
        assert part in read.words, part
    assert read.of("img") == []
    assert "Where it looks" not in read.words
    assert "harmonic" not in read.words


def test_an_image_task_shows_pictures_and_where_the_prompt_looks(tmp_path: Path) -> None:
    tuned = seeing_tuned(tmp_path, ["red", "blue"])
    examples = [{"image": tiny_eyes.picture(seed, colour="red"), "label": "red"} for seed in range(6)]
    found = said(["red"] * 6, ["red", "blue"] * 3, ["red", "blue"])
    read = Reader(page.render(ABOUT, found, tuned, examples))
    pictures = read.of("img")
    assert len(pictures) == 6
    assert all(str(one["src"]).startswith("data:image/jpeg;base64,") and one["alt"] for one in pictures)
    assert "Where it looks" in read.words
    assert "red → blue example 2" in read.words
    # two wrong, two right: each once as it is, and under every map of it
    seen = [str(one["id"]) for one in read.of("image") if "id" in one]
    assert seen == ["seen-1", "seen-2", "seen-3", "seen-4"]
    maps = [one for one in read.of("image") if one.get("class") == "overlay"]
    assert len(read.of("use")) == len(maps) + 4
    assert all(str(one["href"]).removeprefix("#") in seen for one in read.of("use"))


def test_a_real_evaluation_becomes_the_same_page_each_time(tmp_path: Path) -> None:
    case = case_of(registry.load("methods", "vpt"), "vision", tmp_path)
    tuned = case.tuned()
    labels = ["positive", "negative", "neutral", "neutral", "positive"]
    examples = [{**one, "label": label} for one, label in zip(case.examples(), labels, strict=True)]
    found = evaluate(tuned, examples)
    first = page.render(ABOUT, found, tuned, examples)
    assert first == page.render(ABOUT, found, tuned, examples)
    assert page.percent(found.scores["accuracy"]) in Reader(first).words


def test_what_users_write_is_never_markup(tmp_path: Path) -> None:
    evil = [EVIL, '" onload="alert(2)', "' style='x", "{{ 7 * 7 }}", "\u202eright to left"]
    tuned = text_tuned(tmp_path, labels=dict(zip(evil, ("good", "bad", "red", "blue", "old"), strict=True)))
    examples = [{"text": f"{EVIL} \ud800 {label}", "label": label} for label in evil]
    found = said(evil, [*evil[1:], evil[0]], evil)
    about = page.About(EVIL, EVIL, "test")
    content = page.render(about, replace(found, scores={"accuracy": 0.0, EVIL: 1.5}), tuned, examples, notes=[EVIL])
    read = Reader(content)
    assert {tag for tag, _ in read.tags}.isdisjoint({"script", "iframe", "object", "embed", "link", "foreignobject"})
    assert not [name for _, attrs in read.tags for name in attrs if name.startswith("on")]
    assert EVIL in read.words
    assert "{{ 7 * 7 }}" in read.words
    assert "&lt;script&gt;" in content.decode()


@pytest.mark.parametrize("seeing", [False, True])
def test_nothing_is_loaded_from_anywhere(seeing: bool, tmp_path: Path) -> None:
    labels = ["red", "blue"]
    tuned = seeing_tuned(tmp_path, labels) if seeing else text_tuned(tmp_path, labels=labels)
    one = {"image": tiny_eyes.picture(0)} if seeing else {"text": "a cat"}
    examples = [{**one, "label": "red"}] * 2
    content = page.render(ABOUT, said(["red"] * 2, labels, labels), tuned, examples)
    read = Reader(content)
    for _, attrs in read.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
            assert (attrs.get(name) or "#").startswith(("data:", "#"))
    assert not re.search(rb"url\(|@import|https?:", content)
    policy = next(one for one in read.of("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert str(policy["content"]).startswith("default-src 'none'; img-src data:")


def test_base_and_new_classes_come_with_their_harmonic_mean_and_what_it_means(tmp_path: Path) -> None:
    tuned = text_tuned(tmp_path, labels=["red", "blue"])
    examples = [{"text": "a cat", "label": "red"}]
    found = said(["red"], ["red"], ["red", "blue"], accuracy=0.8, new_accuracy=0.6)
    words = Reader(page.render(ABOUT, found, tuned, examples)).words
    assert "Accuracy on base classes 80.0 %" in words
    assert "Accuracy on new classes 60.0 % Harmonic mean 68.6 %" in words
    assert "H = 2 · base · new / (base + new)" in words
    assert "Nothing was confused." in words


def test_the_harmonic_mean_is_of_the_first_score() -> None:
    scores = {"macro_f1": 0.5, "accuracy": 0.9, "new_macro_f1": 0.5, "new_accuracy": 0.9, "harmonic_mean": 0.5}
    found = [(one.name, one.shown) for one in page.headlines(scores, "macro_f1", (0.4, 0.6))]
    assert found == [
        ("Macro F1 on base classes", "50.0 %"), ("Macro F1 on new classes", "50.0 %"), ("Harmonic mean", "50.0 %"),
        ("Accuracy on base classes", "90.0 %"), ("Accuracy on new classes", "90.0 %"),
    ]  # fmt: skip


def test_numbers_are_shown_by_how_far_they_are_off(tmp_path: Path) -> None:
    base = text_tuned(tmp_path, labels=["red", "blue"])
    task = registry.load("tasks", "regress")
    settings = {"template": "{text} it was {mask}", "low": 0, "high": 5}
    tuned = Tuned(base.backbone, task(task.Config.read(settings, where="task")), base.method, max_length=40)
    examples = [{"text": f"cat {number}", "label": float(number)} for number in range(3)]
    found = Evaluation(
        {"pearson": float("nan")}, [Prediction(one) for one in (0.25, 1.0, 4.5)], [0.0, 1.0, 2.0], None, 8
    )
    words = Reader(page.render(ABOUT, found, tuned, examples)).words
    assert "Pearson correlation nan" in words
    assert "Furthest off 2 of 2, the largest difference first. cat 2 True 2 Given 4.5 example 3 cat 0" in words
    assert "Confusions" not in words


@pytest.mark.parametrize("classes", [101, 1000])
def test_the_page_stays_small_however_much_there_is(classes: int, tmp_path: Path) -> None:
    labels = [f"{'a long name of a class ' * 6}{number:04}" for number in range(classes)]
    tuned = text_tuned(tmp_path, labels=["red", "blue"])
    gold = labels * 20
    answers = [labels[(number * number) % classes] for number in range(len(gold))]
    examples = [{"text": "word " * 5000, "label": one} for one in gold]
    scores = dict.fromkeys(labels, 0.9 / classes)
    predictions = [Prediction(one, scores) for one in answers]
    content = page.render(ABOUT, Evaluation({"accuracy": 0.1}, predictions, gold, None, 8), tuned, examples)
    assert 50_000 < len(content) < 2_000_000
    Reader(content)


def test_an_image_that_is_gone_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cat.png"
    tuned = seeing_tuned(tmp_path, ["red", "blue"])
    with pytest.raises(DataError, match="cat.png does not exist"):
        page.render(ABOUT, said(["red"], ["red"], ["red", "blue"]), tuned, [{"image": str(file), "label": "red"}])


def test_a_model_that_cannot_tell_where_it_looks_says_so_on_the_page(tmp_path: Path) -> None:
    case = case_of(registry.load("methods", "vpt"), "siglip", tmp_path)
    bare = Tuned(case.backbone(), case.task())
    examples = [{**case.examples()[0], "label": "positive"}]
    found = said(["positive"], ["positive"], ["positive", "negative", "neutral"])
    words = Reader(page.render(ABOUT, found, bare, examples)).words
    assert "There are no maps of attention: SiglipVisionModel" in words
    assert "none: the frozen model alone" in words


def test_importing_a_report_loads_no_torch() -> None:
    code = "import sys, promptuary.report.page; print(sorted({'torch', 'transformers', 'jinja2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
