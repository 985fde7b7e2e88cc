"""Features of images kept on disk: the same training as without, what makes them anew, where they are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pictures
import tiny
from promptuary.data.images import Picture
from promptuary.errors import ConfigError, Interrupted
from promptuary.features import Features
from promptuary.listening import Stop
from promptuary.training import Result, train
from promptuary.types import Prompt

VARIED = {"crop": [0.5, 1.0], "flip": 0.5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures.write(tmp_path / "images")


def trained(result: Result) -> Tensor:
    return torch.cat([value.flatten() for value in result.prompt.state().values()])


def losses(result: Result) -> list[float]:
    lines = (result.dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [float(line.split('"loss": ')[1].split(",")[0]) for line in lines if '"loss": ' in line]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of pictures as they become pixels."""
    found, look = list[str](), Picture.pixels

    def pixels(self: Picture, sight: Any) -> Tensor:
        found.append(self.name)
        return look(self, sight)

    monkeypatch.setattr(Picture, "pixels", pixels)
    return found


@pytest.mark.parametrize("method", ["coop", "kgcoop", "cocoop", "lasp"])
def test_one_view_trains_as_images_opened_in_each_step(method: str, folder: Path, tmp_path: Path) -> None:
    own = {"method": {"name": method}} | ({"train": {"batch_size": 30}} if method == "cocoop" else {})
    results = [
        train(pictures.run(folder, tmp_path / f"{views}", data={"views": views}, **own), backbone=tiny.backbone("clip"))
        for views in (0, 1)
    ]
    torch.testing.assert_close(trained(results[1]), trained(results[0]), rtol=1e-5, atol=1e-5)
    assert losses(results[1]) == pytest.approx(losses(results[0]), abs=1e-5)
    assert results[0].metrics == pytest.approx(results[1].metrics, abs=1e-5)


def test_as_many_views_as_epochs_are_the_views_of_the_epochs(folder: Path, tmp_path: Path) -> None:
    results = []
    for views in (0, 3, 1):
        settings = {"views": views, "augment": VARIED}
        run = pictures.run(folder, tmp_path / f"{views}", data=settings, train={"epochs": 3, "batch_size": 10})
        results.append(train(run, backbone=tiny.backbone("clip")))
    torch.testing.assert_close(trained(results[1]), trained(results[0]), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(trained(results[2]), trained(results[0]), atol=1e-4), (
        "one view in all epochs is another run"
    )


def test_no_image_is_opened_in_a_step_or_a_validation(folder: Path, tmp_path: Path, opened: list[str]) -> None:
    train(pictures.run(folder, tmp_path / "run", data={"views": 1}), backbone=tiny.backbone("clip"))
    assert len(opened) == 5 * (6 + 2 + 4), "each image once"
    opened.clear()
    cache = str(tmp_path / "cache")
    for name, method in (("one", "coop"), ("two", "kgcoop")):
        run = pictures.run(folder, tmp_path / name, data={"views": 1, "cache": cache}, method={"name": method})
        train(run, backbone=tiny.backbone("clip"))
    assert len(opened) == 5 * (6 + 2 + 4), "the second run finds what the first has left"


def kept(folder: Path, run_folder: Path, **changes: Any) -> tuple[Features, Tensor]:
    """Features of the training images of a run's settings, through a store in `run_folder`."""
    from promptuary.course import Course

    backbone = tiny.backbone(changes.pop("kind", "clip"), changes.pop("seed", 0))
    course = Course(pictures.run(folder, run_folder / "run", **changes), backbone)
    store = Features(backbone, run_folder / "store")
    return store, store.of(course.feed.rows["train"])


def test_they_are_what_the_model_says_and_are_found_again(folder: Path, tmp_path: Path) -> None:
    store, first = kept(folder, tmp_path)
    assert (store.computed, store.found) == (30, 0)
    again, second = kept(folder, tmp_path)
    assert (again.computed, again.found) == (0, 30)
    assert torch.equal(first, second)
    backbone = tiny.backbone("clip")
    from promptuary.course import Course

    learner = Course(pictures.run(folder, tmp_path / "run"), backbone).learner
    rows = Course(pictures.run(folder, tmp_path / "run"), backbone).feed.rows["train"]
    torch.testing.assert_close(first, backbone.pooled(learner.batch(rows), Prompt()), rtol=1e-5, atol=1e-5)


def repainted(folder: Path) -> None:
    one, other = folder / "train" / "cat" / "0.png", folder / "train" / "dog" / "0.png"
    one.write_bytes(other.read_bytes())


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 3},
        {"kind": "pair"},
        {"data": {"shots": 2}},
        repainted,
    ],
    ids=["weights", "model", "rows", "pixels"],
)
def test_anything_that_changes_them_makes_them_anew(
    change: dict[str, Any] | Callable[[Path], None], folder: Path, tmp_path: Path
) -> None:
    kept(folder, tmp_path)
    if callable(change):
        change(folder)
        store, _ = kept(folder, tmp_path)
    else:
        store, _ = kept(folder, tmp_path, **change)
    assert store.computed > 0
    assert store.found == 0


def test_views_differ_by_seed_and_by_how_they_are_varied(folder: Path, tmp_path: Path) -> None:
    from promptuary.course import Course

    store = Features(tiny.backbone("clip"), tmp_path / "store")
    found = []
    for seed, augment in ((0, VARIED), (1, VARIED), (0, {"flip": 1.0})):
        run = pictures.run(folder, tmp_path / "run", data={"views": 2, "augment": augment}, seed=seed)
        feed = Course(run, store.backbone).feed
        found += [store.of([feed.variant(index, view) for index in range(4)]) for view in (0, 1)]
    assert store.found == 0
    assert len({tuple(one.flatten().tolist()) for one in found}) >= 5


@pytest.mark.parametrize("damage", ["cut", "other", "flipped"])
def test_a_damaged_file_is_made_anew(damage: str, folder: Path, tmp_path: Path) -> None:
    _, wanted = kept(folder, tmp_path)
    (file,) = (tmp_path / "store").iterdir()
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-3] ^= 1
    file.write_bytes({"cut": bytes(content[:-20]), "other": b"no tensors", "flipped": bytes(content)}[damage])
    store, found = kept(folder, tmp_path)
    assert store.computed == 30
    assert torch.equal(found, wanted)


def test_what_was_computed_before_a_stop_is_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promptuary.features.TOGETHER", 8)
    calls = 0

    def stop_at_the_third() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Interrupted("stop", 2)

    from promptuary.course import Course

    backbone = tiny.backbone("clip")
    rows = Course(pictures.run(folder, tmp_path / "run"), backbone).feed.rows["train"]
    with pytest.raises(Interrupted):
        Features(backbone, tmp_path / "store").of(rows, stop_at_the_third)
    store = Features(backbone, tmp_path / "store")
    store.of(rows)
    assert (store.found, store.computed) == (16, 14)
    assert not [path for path in (tmp_path / "store").iterdir() if path.suffix != ".safetensors"]


def test_a_run_that_is_stopped_there_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(pictures.run(folder, tmp_path / "whole", data={"views": 1}), backbone=tiny.backbone("clip"))
    run, computed = pictures.run(folder, tmp_path / "run", data={"views": 1}), Features._computed
    stop = Stop()

    def asked_to_stop(self: Features, rows: Any) -> Tensor:
        stop.request()
        return computed(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Features, "_computed", asked_to_stop)
        with pytest.raises(Interrupted, match="the state is saved, continue with --resume"):
            train(run, backbone=tiny.backbone("clip"), stop=stop)
    resumed = train(run, resume=True, backbone=tiny.backbone("clip"))
    assert torch.equal(trained(resumed), trained(whole))
    assert resumed.metrics == whole.metrics


def test_texts_of_classes_run_once_in_a_whole_evaluation(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, calls = train(pictures.run(folder, tmp_path / "run"), backbone=tiny.backbone("clip")), 0
    result.prompt.train(False)  # as a loaded prompt is; one in training is folded for each call
    tower: Any = vars(result.prompt.backbone)["tower"]
    run = tower.features

    def counted(*given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return run(*given)

    monkeypatch.setattr(tower, "features", counted)
    asked = [{"image": str(path)} for path in sorted(folder.glob("train/*/*.png"))]
    result.prompt.predict(asked, batch_size=4)
    result.prompt.predict(asked, batch_size=7)
    assert calls == 1


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"method": {"name": "vpt"}},
            "vpt trains rows among the patches, so that changes in every step; set data.views: 0",
        ),
        ({"method": {"name": "maple", "depth": 2}}, "maple trains rows among the patches"),
        ({"method": {"name": "lasp", "visual_norms": "blocks"}}, "lasp trains layer norms"),
        ({"data": {"views": 2}}, "several views need data.augment.crop or flip"),
    ],
)
def test_where_they_would_be_wrong(parts: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    parts = {**parts, "data": {"views": 1, **parts.get("data", {})}}
    with pytest.raises(ConfigError, match=message):
        train(pictures.run(folder, tmp_path / "run", **parts), backbone=tiny.backbone("clip"))
    assert not (tmp_path / "run").exists()


def test_texts_have_none(tmp_path: Path) -> None:
    import toy

    run = toy.run(tmp_path, "data.views=1")
    with pytest.raises(ConfigError, match=r"data.views keeps features of images; set task.image"):
        train(run, backbone=tiny.backbone("causal"))


def test_a_head_on_kept_features_is_a_head_on_images(folder: Path, tmp_path: Path) -> None:
    """A linear probe trains nothing that sees, so its steps open no image either."""
    from promptuary.config import build_baseline

    states = []
    for views in (0, 1):
        values = pictures.run(folder, tmp_path / f"{views}", "vision", data={"views": views}).model_dump()
        run = build_baseline({**values, "method": None, "baseline": {"name": "linear_probe"}, "solver": None})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("promptuary.training.open_backbone", lambda config: tiny.backbone("vit"))
            states.append(train(run).prompts["classify"].state())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-5)
