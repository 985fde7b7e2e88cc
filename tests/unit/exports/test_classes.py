"""Class matrices: the same scores as the prompt on a plain model, what they carry, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import pictures
import tiny
from promptuary import exports, files
from promptuary.course import Course
from promptuary.errors import FileFormatError, NotFoldable
from promptuary.exports import classes
from promptuary.tuned import Tuned


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pictures.write(tmp_path / "images", train=2, validation=1, test=1)


def moved(folder: Path, out: Path, kind: str = "clip", **parts: Any) -> Tuned:
    """A prompt whose tensors are not where they started."""
    tuned = Course(pictures.run(folder, out, **parts), tiny.backbone(kind)).learner
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for group in tuned.trained():
            group.parameter.add_(0.2 * torch.randn(group.parameter.shape, generator=generator))
    return tuned.train(False)


def pixels(tuned: Tuned, folder: Path) -> torch.Tensor:
    rows = tuned.rows([{"image": str(path)} for path in sorted((folder / "test").glob("*/*.png"))], labelled=False)
    found = tuned.batch(rows).pixels
    assert found is not None
    return found


METHODS = [
    ("coop", {}),
    ("coop", {"class_specific": True}),
    ("kgcoop", {}),
    ("pre", {}),
    ("lasp", {}),
    ("lasp", {"num_groups": 3, "templates": ["a {}.", "{}", "the {}"], "virtual_classes": ["sky"]}),
]


@pytest.mark.parametrize("kind", ["clip", "siglip", "pair"])
@pytest.mark.parametrize(("method", "settings"), METHODS)
def test_a_plain_model_with_the_matrix_scores_as_the_prompt(
    method: str, settings: dict[str, Any], kind: str, folder: Path, tmp_path: Path
) -> None:
    tuned = moved(folder, tmp_path / "run", kind, method={"name": method, **settings})
    exports.write("classes", tuned, tmp_path / "out")
    head, plain = classes.read(tmp_path / "out"), tiny.model(kind)
    images = pixels(tuned, folder)
    rows = tuned.rows([{"image": str(path)} for path in sorted((folder / "test").glob("*/*.png"))], labelled=False)
    with torch.no_grad():
        found = head(plain.get_image_features(pixel_values=images).pooler_output)
        wanted = tuned.scores(tuned.batch(rows))
        live = tuned.train(True).scores(tuned.batch(rows))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, live, rtol=1e-5, atol=1e-5)
    assert head.labels == ("apple", "bird", "cat", "dog", "fish")
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_trained_norms_travel_with_it_under_the_models_own_names(folder: Path, tmp_path: Path) -> None:
    tuned = moved(folder, tmp_path / "run", method={"name": "lasp", "visual_norms": "blocks"})
    exports.write("classes", tuned, tmp_path / "out")
    tensors = safetensors.torch.load_file(tmp_path / "out" / classes.MATRIX)
    norms = {name.removeprefix("norms."): value for name, value in tensors.items() if name.startswith("norms.")}
    plain = tiny.model("clip")
    assert len(norms) == 2 * 2 * 2
    assert not plain.load_state_dict(norms, strict=False).unexpected_keys
    rows = tuned.rows([{"image": str(path)} for path in sorted((folder / "test").glob("*/*.png"))], labelled=False)
    with torch.no_grad():
        features = plain.get_image_features(pixel_values=pixels(tuned, folder)).pooler_output
        wanted = tuned.scores(tuned.batch(rows))
    torch.testing.assert_close(classes.read(tmp_path / "out")(features), wanted, rtol=1e-5, atol=1e-5)
    other = moved(folder, tmp_path / "other", method={"name": "lasp"})
    exports.write("classes", other, tmp_path / "without")
    assert json.loads((tmp_path / "without" / classes.FACTS).read_text())["norms"] == []


def test_the_page_runs_as_it_stands(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = moved(folder, tmp_path / "run", method={"name": "lasp", "visual_norms": "blocks"})
    exports.write("classes", tuned, tmp_path / "out")
    code = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("```python")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    given: dict[str, Any] = {"model": tiny.model("clip"), "pixels": pixels(tuned, folder)}
    exec(code, given)
    rows = tuned.rows([{"image": str(path)} for path in sorted((folder / "test").glob("*/*.png"))], labelled=False)
    torch.testing.assert_close(given["logits"], tuned.scores(tuned.batch(rows)), rtol=1e-5, atol=1e-5)


def test_without_a_method_it_is_the_zero_shot_head(folder: Path, tmp_path: Path) -> None:
    tuned = moved(folder, tmp_path / "run")
    plain = Tuned(tuned.backbone, tuned.task)
    exports.write("classes", plain, tmp_path / "out")
    ids = plain.backbone.tokenizer([f"a {name} ." for name in plain.task.labels], padding=True, return_tensors="pt")
    model = tiny.model("clip")
    with torch.no_grad():
        texts = model.get_text_features(**ids).pooler_output
    wanted = torch.nn.functional.normalize(texts, dim=-1)
    torch.testing.assert_close(classes.read(tmp_path / "out").weight.data, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "parts", "message"),
    [
        ("clip", {"method": {"name": "cocoop"}}, "the class texts of cocoop depend on the image"),
        ("clip", {"method": {"name": "maple", "depth": 2}}, "also stands among the patches of the image"),
        ("vit", {"family": "vision"}, "only a task with label words on a model with a text tower"),
    ],
)
def test_what_no_matrix_can_say_is_refused(
    kind: str, parts: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    tuned = moved(folder, tmp_path / "run", kind, **parts)
    with pytest.raises(NotFoldable, match=message):
        exports.write("classes", tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_export_is_refused(folder: Path, tmp_path: Path) -> None:
    exports.write("classes", moved(folder, tmp_path / "run"), tmp_path / "out")
    matrix = tmp_path / "out" / classes.MATRIX
    content = bytearray(matrix.read_bytes())
    content[-2] ^= 1
    matrix.write_bytes(bytes(content))
    with pytest.raises(FileFormatError):
        classes.read(tmp_path / "out")
    files.write_json(tmp_path / "out" / classes.FACTS, {"format": "else"})
    with pytest.raises(FileFormatError, match="is no matrix of classes of this release"):
        classes.read(tmp_path / "out")
