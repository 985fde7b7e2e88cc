"""Earlier prompts as a start: what of them is read, what is refused, and what a resumed run says of other ones.

Knows nothing of training's inside.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from promptuary import registry
from promptuary.backbones.base import Backbone
from promptuary.checkpoint import load_prompt, save_prompt
from promptuary.errors import (
    ConfigError,
    FileFormatError,
    FingerprintError,
    Interrupted,
    NotFoldable,
    PromptuaryError,
)
from promptuary.hosting import adapt
from promptuary.listening import Listener
from promptuary.sources import load_source, load_start
from promptuary.testing.case import Case, case_of
from promptuary.training import train

FAMILY = "masked"


def case(folder: Path, method: str = "attempt", **settings: Any) -> Case:
    found = registry.load("methods", method)
    return case_of(found, FAMILY, folder, {**found.tiny, **settings})


def source(folder: Path, name: str, method: str = "prompt_tuning", seed: int = 5, **settings: Any) -> Path:
    """An earlier prompt, saved with a score."""
    settings = {"num_virtual_tokens": 3, **settings} if method == "prompt_tuning" else settings
    made = case(folder, method, **settings).tuned(seed=seed)
    return save_prompt(made, folder / name, metrics={"test accuracy": 0.75})


def refusal(call: Any, kind: type[PromptuaryError]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def base() -> Backbone:
    return tiny.backbone(FAMILY)


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_a_source_says_what_it_was(tmp_path: Path, base: Backbone) -> None:
    made = case(tmp_path, "lamp").tuned(base, seed=5)
    saved = load_source(save_prompt(made, tmp_path / "run" / "prompt", metrics={"test accuracy": 0.75}), base)
    assert (saved.name, saved.method) == (str(tmp_path / "run" / "prompt"), "lamp")
    assert saved.settings["rank"] == made.method.config.rank  # type: ignore[union-attr]
    assert saved.metrics == {"test accuracy": 0.75}
    assert made.method is not None
    wanted = dict(made.method.state_dict())
    assert saved.tensors.keys() == wanted.keys()
    assert all(torch.equal(saved.tensors[name], value) for name, value in wanted.items())
    assert torch.equal(saved.rows(), made.method.fold().as_rows())
    # the run folder around it is as good
    assert torch.equal(load_source(tmp_path / "run", base).rows(), saved.rows())


def test_the_start_has_every_source_in_order_and_the_rows_of_init_prompt(tmp_path: Path, base: Backbone) -> None:
    folders = [str(source(tmp_path, f"s{seed}", seed=seed)) for seed in (1, 2, 3)]
    config = case(tmp_path).config(sources=folders[:2], init="saved", init_prompt=folders[2])
    rows, sources = load_start(config, base)
    assert rows is not None
    assert torch.equal(rows, load_source(folders[2], base).rows())
    assert [one.name for one in sources] == folders[:2]
    assert not torch.equal(sources[0].rows(), sources[1].rows())
    assert load_start(case(tmp_path, "prompt_tuning").config(), base) == (None, ())


def test_a_prompt_with_constants_is_a_source_too(tmp_path: Path, base: Backbone) -> None:
    made = case(tmp_path, "bbt").tuned(base)
    saved = load_source(save_prompt(made, tmp_path / "bbt"), base)
    assert made.method is not None
    assert torch.equal(saved.rows(), made.method.fold().as_rows())


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_source_of_another_base_is_refused_with_both_names(tmp_path: Path) -> None:
    folder = source(tmp_path, "s")
    text = refusal(lambda: load_source(folder, tiny.backbone(FAMILY, seed=4)), FingerprintError)
    assert "tiny-bert-0" in text
    assert "tiny-bert-4" in text
    config = case(tmp_path).config(sources=[str(folder)])
    assert "tiny-bert-4" in refusal(lambda: load_start(config, tiny.backbone(FAMILY, seed=4)), FingerprintError)


@pytest.mark.parametrize(("method", "reason"), [("attempt", "depends on the input"), ("dept", "table")])
def test_a_source_that_is_no_table_of_rows_is_refused_by_name(
    method: str, reason: str, tmp_path: Path, base: Backbone
) -> None:
    folder = source(tmp_path, "s", method)
    text = refusal(lambda: case(tmp_path).tuned(base, sources=[str(folder)]), NotFoldable)
    assert str(folder) in text
    assert reason in text
    config = case(tmp_path, "prompt_tuning").config(init="saved", init_prompt=str(folder))
    assert reason in refusal(lambda: load_start(config, base), NotFoldable)


@pytest.mark.parametrize("rows", [2, 4])
def test_a_source_of_another_length_is_refused_with_both(rows: int, tmp_path: Path, base: Backbone) -> None:
    folder = source(tmp_path, "s", num_virtual_tokens=rows)
    text = refusal(lambda: case(tmp_path).tuned(base, sources=[str(folder)]), ConfigError)
    assert f"{folder} has {rows} rows" in text
    assert "num_virtual_tokens is 3" in text


def test_a_source_that_is_not_there_or_damaged_is_refused_by_name(tmp_path: Path, base: Backbone) -> None:
    config = case(tmp_path).config(sources=[str(tmp_path / "nowhere")])
    assert str(tmp_path / "nowhere") in refusal(lambda: load_start(config, base), FileFormatError)
    folder = source(tmp_path, "s")
    (folder / "prompt.safetensors").write_bytes(b"")
    config = case(tmp_path).config(sources=[str(folder)])
    assert str(folder) in refusal(lambda: load_start(config, base), FileFormatError)


def test_a_host_that_adapts_a_model_gets_the_same_start_and_the_same_refusal(tmp_path: Path) -> None:
    kept = tiny.model(tiny.FAMILIES[FAMILY])
    words = tiny.tokenizer()
    folder = source(tmp_path, "s", num_virtual_tokens=2)
    text = refusal(lambda: adapt(kept, words, "attempt", num_virtual_tokens=3, sources=[str(folder)]), ConfigError)
    assert "num_virtual_tokens is 3" in text
    made = adapt(kept, words, "attempt", num_virtual_tokens=2, sources=[str(folder)])
    assert made.method is not None
    assert torch.equal(made.method.constants(drawn=False)["sources"][0], load_source(folder, made.backbone).rows())
    made.backbone.release()


# ---- resuming -------------------------------------------------------------------------------------------------------


class StopAt(Listener):
    """Asks for a stop once a step is reached."""

    def __init__(self, step: int) -> None:
        self.step = step

    def begun(self, training: Any) -> None:
        self.training = training

    def stepped(self, row: Mapping[str, Any]) -> None:
        if row["step"] == self.step:
            self.training.stop.request()


def test_a_resumed_run_whose_source_changed_is_refused_and_goes_on_when_it_is_back(tmp_path: Path) -> None:
    first, second = (source(tmp_path, f"s{seed}", seed=seed) for seed in (1, 2))
    toy = case(tmp_path)
    run = toy.run("run", steps=6, method=toy.config(sources=[str(first), str(second)]).model_dump())
    with pytest.raises(Interrupted):
        train(run, listener=StopAt(3), backbone=toy.backbone())
    first.rename(tmp_path / "aside")
    assert str(first) in refusal(lambda: train(run, resume=True, backbone=toy.backbone()), FileFormatError)
    source(tmp_path, "s1", seed=3)
    text = refusal(lambda: train(run, resume=True, backbone=toy.backbone()), ConfigError)
    assert "--fresh" in text
    shutil.rmtree(first)
    (tmp_path / "aside").rename(first)
    assert train(run, resume=True, backbone=toy.backbone()).facts["steps"] == 6


def test_constants_are_the_same_after_training_and_in_what_was_saved(tmp_path: Path, base: Backbone) -> None:
    folders = [source(tmp_path, f"s{seed}", seed=seed) for seed in (1, 2)]
    toy = case(tmp_path)
    run = toy.run("run", steps=4, method=toy.config(sources=[str(one) for one in folders]).model_dump())
    result = train(run, backbone=base)
    again = load_prompt(result.dir / "prompt", base).method
    assert again is not None
    wanted = torch.stack([load_source(one, base).rows() for one in folders])
    assert torch.equal(again.constants(drawn=False)["sources"], wanted)
    # a saved prompt holds its sources: they may go
    for one in folders:
        shutil.rmtree(one)
    assert load_prompt(result.dir / "prompt", base).predict(["a red cat"])
