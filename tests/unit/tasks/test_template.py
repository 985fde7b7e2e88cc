"""Templates: parsed once, wrong ones refused in one line, filled without touching what the data says.

Knows no tokenizer.
"""

from __future__ import annotations

import pytest

from promptuary.errors import ConfigError, DataError
from promptuary.tasks.template import Template, default_template
from promptuary.types import Piece


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{text", "write {{ for a literal brace"),
        ("text}", "write {{ for a literal brace"),
        ("{}", "every place needs a name"),
        ("{0} {mask}", "every place needs a name"),
        ("{two words}", "every place needs a name"),
        ("{a.b}", "every place needs a name"),
        ("{a[0]}", "every place needs a name"),
        ("{mask} {mask}", "more than one {mask}"),
        ("{text!r}", "takes no ! or :"),
        ("{hour:mm}", "takes no ! or :"),
    ],
)
def test_a_wrong_template_is_refused_in_one_line(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match="task.template") as caught:
        Template(text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pieces_keep_their_order_and_role() -> None:
    template = Template("{{q}} {a}{sep}{b}: {prompt} {prompt_x} {mask}.")
    assert template.fields == ["a", "b"]
    assert template.slots == ["sep", "prompt", "prompt_x", "mask"]
    assert template.fill({"a": "one", "b": 2}) == [
        Piece("fixed", "{"),
        Piece("fixed", "q}"),
        Piece("fixed", " "),
        Piece("field", "one"),
        Piece("slot", "sep"),
        Piece("field", "2"),
        Piece("fixed", ": "),
        Piece("slot", "prompt"),
        Piece("fixed", " "),
        Piece("slot", "prompt_x"),
        Piece("fixed", " "),
        Piece("slot", "mask"),
        Piece("fixed", "."),
    ]


def test_braces_in_the_data_are_plain_text() -> None:
    assert Template("{text}").fill({"text": "{mask} {other} }"}) == [Piece("field", "{mask} {other} }")]


def test_a_field_may_stand_twice() -> None:
    assert [piece.value for piece in Template("{a} {a}").fill({"a": "x"})] == ["x", " ", "x"]


def test_a_missing_field_names_the_nearest() -> None:
    with pytest.raises(DataError, match='did you mean "sentence"') as caught:
        Template("{sentense}").fill({"sentence": "x", "label": "y"})
    assert "(fields: sentence, label;" in str(caught.value)


def test_extra_fields_win_over_the_data() -> None:
    assert Template("{a}").fill({"a": "data"}, {"a": "more"}) == [Piece("field", "more")]


@pytest.mark.parametrize(
    ("text", "at_end"),
    [("{a}", True), ("{a} {mask}", True), ("{a} {mask}.", False), ("{mask} {a}", False), ("{mask}", True)],
)
def test_whether_the_answer_stands_at_the_end(text: str, at_end: bool) -> None:
    assert Template(text).asks_at_end is at_end


@pytest.mark.parametrize(
    ("text", "glue"),
    [
        ("{a} is {mask}", " "),
        ("{a}{mask}", " "),
        ("{a}\nanswer:\n{mask}", "\n"),
        ("{a} answer: \n {mask}", "\n"),
        ("{a}", " "),
        ("{a} answer:", " "),
        ("{a} answer:\n", "\n"),
    ],
)
def test_what_joins_text_and_answer(text: str, glue: str) -> None:
    assert Template(text).glue == glue


def test_the_default_is_the_fields_with_separators() -> None:
    assert default_template(["a"]) == "{a}"
    assert default_template(["a", "b"]) == "{a}{sep}{b}"
