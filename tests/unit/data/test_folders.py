"""Folders of images: every class and split is found, and what is no image is told and left out.

Knows no task but the smallest that shows an image.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from promptuary.data.check import RowCheck
from promptuary.data.folders import image_folders
from promptuary.data.load import DataConfig, Splits, load
from promptuary.errors import ConfigError, DataError
from promptuary.tasks.classify import Classify, ClassifyConfig

ANY = {"train": None, "validation": None, "test": None}
TASK = ClassifyConfig(image="image")


def draw(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (number % 256, number // 256, 7)).save(path)
    return path


def classes(folder: Path, start: int = 0, count: int = 6, labels: tuple[str, ...] = ("cat", "dog")) -> Path:
    for place, label in enumerate(labels):
        for number in range(count):
            draw(folder / label / f"{number}.png", start + place * count + number)
    return folder


def run(source: Path, task: ClassifyConfig = TASK, **options: Any) -> Splits:
    config = DataConfig.read({"source": str(source), **options}, where="data")
    check: RowCheck = Classify.check(task)
    return load(config, Classify.required(task), torch.Generator().manual_seed(0), check)


def message(source: Path, **options: Any) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        run(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- layouts --------------------------------------------------------------------------------------------------------


def test_class_folders_alone_are_the_training_split(tmp_path: Path) -> None:
    splits = run(classes(tmp_path / "pets"))
    assert (len(splits.train), len(splits.validation)) == (11, 1)
    everything = sorted(str(row["image"]) for row in (*splits.train, *splits.validation))
    assert everything == [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(6)]
    assert all(str(row["image"]).startswith(f"{row['label']}/") for row in splits.train)


@pytest.mark.parametrize("name", ["validation", "valid", "dev", "val"])
def test_splits_are_folders_around_them(tmp_path: Path, name: str) -> None:
    classes(tmp_path / "train")
    classes(tmp_path / name, 100, 2)
    classes(tmp_path / "test", 200, 3)
    splits = run(tmp_path)
    assert (len(splits.train), len(splits.validation), len(splits.test), splits.notes) == (12, 4, 6, ())


def test_a_split_can_be_named(tmp_path: Path) -> None:
    classes(tmp_path / "seen")
    classes(tmp_path / "unseen", 100, 2)
    splits = run(tmp_path, train="seen", test="unseen")
    assert (len(splits.train) + len(splits.validation), len(splits.test)) == (12, 4)
    assert "unsen is no folder with a folder of images for each class" in message(tmp_path, train="seen", test="unsen")


def test_two_usual_names_of_a_split_are_an_error(tmp_path: Path) -> None:
    for number, name in enumerate(("train", "val", "dev")):
        classes(tmp_path / name, 50 * number)
    assert "dev and val; say which one with data.validation" in message(tmp_path)


def test_a_folder_around_it_changes_nothing(tmp_path: Path) -> None:
    classes(tmp_path / "a" / "b" / "101_ObjectCategories")
    assert {row["label"] for row in run(tmp_path / "a").train} == {"cat", "dog"}


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    classes(tmp_path, labels=("car", "train", "test"))
    assert {row["label"] for row in run(tmp_path).train} == {"car", "train", "test"}


def test_images_may_lie_deeper_and_have_endings_in_capitals(tmp_path: Path) -> None:
    classes(tmp_path)
    draw(tmp_path / "cat" / "old" / "1.PNG", 99)
    table = image_folders(tmp_path, ANY)["train"]
    assert {"image": "cat/old/1.PNG", "label": "cat"} in table.rows.values()


def test_tables_come_before_images(tmp_path: Path) -> None:
    classes(tmp_path)
    (tmp_path / "train.csv").write_text("image,label\n" + "cat/0.png,a\ndog/1.png,b\n" * 4)
    assert {row["label"] for row in run(tmp_path).train} == {"a", "b"}


@pytest.mark.parametrize("names", [(), ("notes.txt",), ("a/notes.txt",)])
def test_a_folder_without_images_is_none(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert image_folders(tmp_path, ANY) == {}
    assert "has nothing named train" in message(tmp_path)


# ---- what is told ---------------------------------------------------------------------------------------------------


def test_what_is_no_image_is_counted_and_hidden_files_are_not(tmp_path: Path) -> None:
    folder = classes(tmp_path / "pets")
    for name in ("cat/Thumbs.db", "cat/a.txt", "readme.txt", "dog/.DS_Store", ".git/a.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    (folder / "bird").mkdir()
    notes = image_folders(folder, ANY)["train"].notes
    assert notes == (
        "pets: 3 files that are no images were left out (.db, .txt)",
        "pets: folders without images were left out: bird",
    )
    assert run(folder).notes[:2] == notes


def test_a_bad_image_is_an_error_before_anything_runs_or_is_skipped_by_name(tmp_path: Path) -> None:
    folder = classes(tmp_path / "pets")
    Image.effect_noise((64, 64), 50).save(folder / "dog" / "3.png")
    (folder / "dog" / "3.png").write_bytes((folder / "dog" / "3.png").read_bytes()[:2000])
    (folder / "cat" / "1.png").write_bytes(b"")
    assert message(folder) == (
        "pets file cat/1.png is empty (0 bytes); file dog/3.png is cut short or damaged (image file is truncated); "
        "mend them or set data.on_bad_row=skip"
    )
    splits = run(folder, on_bad_row="skip")
    assert len(splits.train) + len(splits.validation) == 10
    assert "2 bad rows skipped: pets files cat/1.png, dog/3.png" in splits.notes
    assert splits.skipped == {"pets": (2, 10)}


def test_a_label_that_training_lacks_is_named_with_its_file(tmp_path: Path) -> None:
    classes(tmp_path / "pets" / "train")
    classes(tmp_path / "pets" / "test", 100, 1, ("cat", "bird"))
    assert message(tmp_path / "pets").startswith('pets/test file bird/0.png: unknown label "bird"')


def test_the_same_image_in_training_and_test_is_told(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    classes(tmp_path / "test", 100, 3)
    shutil.copy(tmp_path / "train" / "cat" / "0.png", tmp_path / "test" / "cat" / "2.png")
    shutil.copy(tmp_path / "train" / "dog" / "0.png", tmp_path / "train" / "dog" / "9.png")
    classes(tmp_path / "val", 200, 3)
    name = tmp_path.name
    assert run(tmp_path).notes == (
        f"1 training row has the same input as an earlier one: {name}/train file dog/9.png",
        f"1 of 6 test rows: the same input as a training row, so their scores flatter: {name}/test file cat/2.png",
    )


def test_a_text_task_is_told_what_to_set(tmp_path: Path) -> None:
    task = ClassifyConfig()
    with pytest.raises(DataError, match='has no column "text"; set task.image: image'):
        run(classes(tmp_path), task)


# ---- the hash -------------------------------------------------------------------------------------------------------


def test_the_hash_depends_on_the_images_and_not_on_where_they_lie(tmp_path: Path) -> None:
    first, second = classes(tmp_path / "here"), classes(tmp_path / "else" / "where")
    before = run(first).hash
    assert run(second).hash == before
    draw(second / "cat" / "0.png", 999)
    assert run(second).hash != before


# ---- tables of images -----------------------------------------------------------------------------------------------


def test_paths_in_a_table_begin_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes(tmp_path / "images")
    lines = [f"images/{label}/{number}.png,{label}" for label in ("cat", "dog") for number in range(6)]
    (tmp_path / "rows.csv").write_text("\n".join(["photo,label", *lines, "images/no.png,cat"]) + "\n")
    task = ClassifyConfig(image="photo")
    with pytest.raises(DataError, match="rows.csv line 14: images/no.png does not exist"):
        run(tmp_path / "rows.csv", task)
    splits = run(tmp_path / "rows.csv", task, on_bad_row="skip")
    assert len(splits.train) + len(splits.validation) == 12
    monkeypatch.chdir(tmp_path)
    assert run(Path("rows.csv"), task, on_bad_row="skip").hash == splits.hash


def test_a_list_of_paths_and_labels_is_a_table(tmp_path: Path) -> None:
    classes(tmp_path / "images dir")
    lines = [
        f"images dir/{label}/{number}.png {place}" for place, label in enumerate(("cat", "dog")) for number in range(6)
    ]
    (tmp_path / "train800.txt").write_text("\n".join(lines[::2]) + "\n")
    (tmp_path / "val200.txt").write_text("\n".join(lines[1::2]) + "\n")
    splits = run(tmp_path, train="train800.txt", validation="val200.txt", label_names=["cat", "dog"])
    assert (len(splits.train), len(splits.validation)) == (6, 6)
    assert [row["label"] for row in splits.train] == ["cat"] * 3 + ["dog"] * 3
    (tmp_path / "bad.txt").write_text("just-one-word\n")
    assert "bad.txt line 1: not a path and a label" in message(tmp_path / "bad.txt")


def test_images_inside_parquet_are_read(tmp_path: Path) -> None:
    import datasets

    classes(tmp_path / "images", count=8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    stored = [
        {"image": {"bytes": path.read_bytes(), "path": path.name}, "label": path.parent.name}
        for path in sorted((tmp_path / "images").rglob("*.png"))
    ]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(stored, features=features).to_parquet(str(tmp_path / "set" / "train.parquet"))
    shutil.rmtree(tmp_path / "images")
    splits = run(tmp_path / "set")
    assert len(splits.train) + len(splits.validation) == 16
    assert splits.train[0]["image"].opened().size == (6, 5)
