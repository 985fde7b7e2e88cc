"""Tasks with an image: how it is asked, checked and filled, and labels in words.

Knows no backbone that sees; every image is made here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tiny
from promptuary.asking import Asking
from promptuary.data.images import Picture
from promptuary.errors import ConfigError, DataError
from promptuary.tasks.choose import Choose, ChooseConfig
from promptuary.tasks.classify import Classify, ClassifyConfig
from promptuary.tasks.generate import Generate, GenerateConfig
from promptuary.types import Encoded, Piece, Sight

SEEN = Image.new("RGB", (4, 4), "red")


def task(**settings: Any) -> Classify:
    values = {"image": "image", "labels": ["cat", "guinea_pig"], **settings}
    return Classify(ClassifyConfig.read(values, where="task"))


# ---- the template ---------------------------------------------------------------------------------------------------


def test_without_a_template_the_image_is_shown_alone() -> None:
    made = task(image="photo")
    pieces = made.fill({"photo": SEEN}, labelled=False).pieces
    assert [piece.role for piece in pieces] == ["image"]
    assert pieces[0].value.source is SEEN
    assert made.asked(made.config) == ("photo",)
    assert made.required(made.config) == ("photo", "label")


def test_an_image_can_stand_among_text() -> None:
    made = task(template="{image} of {text}: {mask}")
    pieces = made.fill({"image": SEEN, "text": "spring"}, labelled=False).pieces
    assert [piece.role for piece in pieces] == ["image", "fixed", "field", "fixed", "slot"]
    assert made.required(made.config) == ("image", "text", "label")


@pytest.mark.parametrize("template", ["{text}", "{image} and {image}"])
def test_the_template_shows_the_image_once(template: str) -> None:
    with pytest.raises(ConfigError, match="should show the image once: put {image} into it"):
        task(template=template)


def test_the_answer_cannot_be_the_image() -> None:
    with pytest.raises(ConfigError, match="shows the answer field"):
        task(label="image")


def test_other_tasks_take_images_too() -> None:
    choose = Choose(ChooseConfig(image="image"))
    assert choose.fill({"image": SEEN, "choices": ["a", "b"], "label": 1}, labelled=True).pieces[0].role == "image"
    question = choose.question(choose.config, {"image": SEEN, "choices": ["a", "b"]})
    assert question == (Picture(SEEN).digest, "a", "b")
    generate = Generate(GenerateConfig(image="image", target="caption"))
    assert generate.fill({"image": SEEN, "caption": "red"}, labelled=True).pieces[0].role == "image"


# ---- what is wrong with an example ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b"words", "image is no image, or of a kind that Pillow cannot read"),
        (b"", "image is empty (0 bytes)"),
        (None, "image is missing or blank"),
        ("no.jpg", "no.jpg does not exist"),
        (7, "image should be a path or an image, got int"),
    ],
)
def test_an_image_that_cannot_be_read_is_found_when_the_row_is(value: Any, expected: str) -> None:
    made = task()
    row = {"image": value, "label": "cat"}
    assert made.check(made.config).problem("train", row) == expected
    with pytest.raises(DataError) as caught:
        made.fill(row, labelled=True)
    assert str(caught.value) == expected


def test_a_question_is_the_content_of_the_image() -> None:
    made = task()
    again, other = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    asked = [made.question(made.config, {"image": one}) for one in (SEEN, again, other)]
    assert asked[0] == asked[1] != asked[2]


# ---- labels in words ------------------------------------------------------------------------------------------------


def test_a_template_makes_the_words_of_labels_that_have_none() -> None:
    made = task(label_template="a photo of a {}.")
    assert made.words == ("a photo of a cat.", "a photo of a guinea pig.")
    assert made.names == ("cat", "guinea pig")
    assert made.spoken_as("polar_bear") == "a photo of a polar bear."
    again = Classify(made.settled())  # type: ignore[arg-type]
    assert (again.labels, again.words, again.names) == (made.labels, made.words, made.names)


def test_given_words_are_both() -> None:
    made = task(labels={"cat": "a cat", "dog": "a dog"}, label_template="a photo of {}.")
    assert made.words == made.names == ("a cat", "a dog")
    again = Classify(made.settled())  # type: ignore[arg-type]
    assert (again.words, again.names) == (made.words, made.names)


def test_names_are_words_by_default() -> None:
    assert task().words == task().names == ("cat", "guinea pig")


@pytest.mark.parametrize("template", ["a photo", "{} and {}", ""])
def test_a_label_template_has_one_place(template: str) -> None:
    with pytest.raises(ConfigError, match="label_template: expected one place {}"):
        task(label_template=template)


# ---- on a backbone --------------------------------------------------------------------------------------------------


class Reads:
    """As much of a backbone that sees as examples need."""

    name, answer_at, abilities, sight = "sees", "none", frozenset({"words", "pool"}), Sight((4, 4), 4)
    device = "cpu"

    def answer_ids(self, words: str, *, glue: str = " ") -> list[int]:
        return [len(words)]

    def encode(self, pieces: list[Piece], max_length: int) -> Encoded:
        return Encoded([0], [0], {}, image=next(piece.value for piece in pieces if piece.role == "image"))


def asking(**settings: Any) -> Asking:
    reads: Any = Reads()
    made = Asking.__new__(Asking)
    made.backbone, made.task, made.max_length, made.word_ids, made.words_at = (reads, task(**settings), 8, [], None)
    return made


def test_an_image_alone_stands_for_the_only_field(tmp_path: Path) -> None:
    SEEN.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    forms = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        content,
        {"bytes": content, "path": None},
        SEEN,
        np.asarray(SEEN),
        {"image": SEEN},
    ]
    made = asking()
    rows = made.rows(made.mappings(forms), labelled=False)
    assert all(np.array_equal(np.asarray(row.encoded.image.opened()), np.asarray(SEEN)) for row in rows)


def test_a_wrong_image_is_named_by_its_place() -> None:
    made = asking()
    with pytest.raises(DataError, match="example 2: no.jpg does not exist"):
        made.rows(made.mappings([SEEN, "no.jpg"]), labelled=False)
    with pytest.raises(DataError, match="example 2: the image should be a path or an image, got int"):
        made.mappings([SEEN, 3])


@pytest.mark.parametrize("one", [SEEN, np.asarray(SEEN), b"x", "a.png"])
def test_a_single_image_is_no_list(one: Any) -> None:
    with pytest.raises(DataError, match="put it into a list"):
        asking().mappings(one)


def test_an_image_where_there_are_more_fields_is_refused() -> None:
    with pytest.raises(DataError, match="expected a mapping of the fields image, text, got one Image"):
        asking(template="{image} {text}").mapping(SEEN)


def test_a_model_that_reads_text_refuses_images() -> None:
    made = Asking(tiny.backbone("causal"), task(), 16)
    with pytest.raises(ConfigError, match="this model reads text, not images; use a vision or a dual model"):
        made.row({"image": SEEN}, 0)
