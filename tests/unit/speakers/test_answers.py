from __future__ import annotations

import pytest

from promptuary.speakers.answers import Reader, label_in, listed, refuses, unquoted

LABELS = ("negative", "positive")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("positive", 1),
        ("Positive.", 1),
        ("**Negative**", 0),
        ('"positive"', 1),
        ("The sentiment is positive.", 1),
        ("Label: negative, clearly negative", 0),
        ("not negative but positive", None),
        ("positively", None),
        ("nonnegative", None),
        ("", None),
        ("maybe", None),
    ],
)
def test_labels(text: str, place: int | None) -> None:
    assert label_in(text, LABELS) == place


def test_a_longer_label_hides_the_one_inside_it() -> None:
    labels = ("good", "very good", "sci/tech", "C++")
    assert label_in("It is very good!", labels) == 1
    assert label_in("good", labels) == 0
    assert label_in("very good, I mean good", labels) is None
    assert label_in("Sci/Tech news", labels) == 2
    assert label_in("I like c++ most", labels) == 3
    assert label_in("C++", ("C", "C++")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I cannot assist with this request.",  # noqa: RUF001
        "I am unable to help.",
        "Sorry, but I can't do that.",
        "As an AI language model, I cannot do that",
        "I cannot comply.",
        "I won't write this.",
    ],
)
def test_refusals(text: str) -> None:
    assert refuses(text)
    assert listed(text) == []


@pytest.mark.parametrize(
    "text", ["", "positive", "I'm sorry this film exists.", "I cannot recommend this film enough", "Sorry plot."]
)
def test_what_only_sounds_like_a_refusal(text: str) -> None:
    assert not refuses(text)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("Classify the review.", ["Classify the review."]),
        ('"Classify the review."', ["Classify the review."]),
        ("Here are two:\n1. First one.\n2) \"Second one.\"", ["First one.", "Second one."]),
        ("- **a**\n- b\n- a\n-  \n", ["a", "b"]),
        ("1. one\n   goes on\n2. two", ["one\n   goes on", "two"]),
        ('["a b", "c"]', ["a b", "c"]),
        ('```json\n["a b", "c"]\n```', ["a b", "c"]),
        ("[not json", ["[not json"]),
        ("Prompt 1: do this\nPrompt 2: do that", ["do this", "do that"]),
        ("1. ok\n2. I'm sorry, but I can't do more.", ["ok"]),
        ("", []),
        ("Two lines\nof one prompt", ["Two lines\nof one prompt"]),
    ],
)  # fmt: skip
def test_lists(text: str, items: list[str]) -> None:
    assert listed(text) == items


def test_quotation_marks_go_only_around_the_whole() -> None:
    assert unquoted('"a" and "b"') == '"a" and "b"'
    assert unquoted("“a”") == "a"
    assert unquoted("''") == ""


def test_a_reader_counts_what_it_could_not_read() -> None:
    reader = Reader()
    found = [reader.label(text, LABELS) for text in ("positive", "maybe", "", None, "I'm sorry, I can't answer.")]
    assert found == [1, None, None, None, None]
    assert reader.candidates("1. a") == ["a"]
    assert reader == Reader(asked=6, empty=2, refused=1, unparsed=1)
