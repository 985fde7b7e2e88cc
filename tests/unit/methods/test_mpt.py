"""MPT: its product and its loss against small computations of our own, its sizes, its teacher, and what it refuses.

Knows no other method but prompt tuning, which it reduces to.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
import toy
from promptuary import registry
from promptuary.backbones.base import Backbone
from promptuary.checkpoint import load_prompt
from promptuary.config import build, load_run
from promptuary.course import Course
from promptuary.errors import ConfigError, NotFoldable, SiteError
from promptuary.methods.base import MethodConfig
from promptuary.methods.mpt import MPT, MPTConfig
from promptuary.methods.prompt_tuning import PromptTuning, PromptTuningConfig
from promptuary.passes import outputs
from promptuary.prompts.init import Saved, Starting
from promptuary.tasks.classify import Classify, ClassifyConfig
from promptuary.testing.case import TEXTS, case_of, logged
from promptuary.training import train
from promptuary.tuned import Tuned
from promptuary.types import Batch, Outputs, Prompt, Shape, View

D, L = tiny.WIDTH, 4
TASK = ClassifyConfig(template="{text} it was {mask}", labels={"yes": "good", "no": "bad", "else": "maybe"})


def noise(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def saved(
    tensors: Mapping[str, Tensor], name: str = "out/source", method: str = "mpt", placement: str = "front"
) -> Saved:
    rows = tensors["rows"] if method != "mpt" else tensors["rows"] * (tensors["u"] @ tensors["v"])
    return Saved(name, method, {"placement": placement}, tensors, Prompt(rows=rows[None]), {})


def earlier(seed: int, rank: int = 1, rows: Tensor | None = None) -> dict[str, Tensor]:
    shared = noise(L, D, seed=1) if rows is None else rows
    return {"rows": shared, "u": noise(L, rank, seed=seed), "v": noise(rank, D, seed=seed + 1)}


def made(backbone: Backbone, sources: tuple[Saved, ...] = (), seed: int = 0, **settings: Any) -> MPT:
    """MPT from sources; the last is the teacher where the settings name one."""
    own = sources[:-1] if settings.get("teacher") else sources
    values = {"num_virtual_tokens": L, "sources": tuple(one.name for one in own), **settings}
    method = MPT(MPTConfig(**values), backbone.shape)
    method.initialise(Starting(backbone.vocabulary, torch.Generator().manual_seed(seed), sources=sources))
    return method


def taught(backbone: Backbone, rows: Tensor, **settings: Any) -> MPT:
    """MPT with a teacher of these rows."""
    teacher = saved({"rows": rows}, "out/teacher", "prompt_tuning")
    return made(backbone, (teacher,), teacher="out/teacher", **settings)


def tuned(backbone: Backbone, method: Any) -> tuple[Tuned, Batch]:
    examples = [
        {"text": text, "label": label} for text, label in zip(TEXTS, ("yes", "no", "else", "no", "yes"), strict=True)
    ]
    whole = Tuned(backbone, Classify(TASK), method, max_length=40)
    return whole, whole.batch(whole.rows(examples, labelled=True))


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_count_gives_the_published_numbers() -> None:
    """77,668 for one task on T5-base; (76,800 + 8 * 868) / 8 = 10,468 for each of eight tasks that share P."""
    config = MPTConfig(num_virtual_tokens=100)
    assert MPT.count(config, Shape(768)) == 77_668
    sizes = {name: value.numel() for name, value in MPT(config, Shape(768)).named_parameters()}
    assert sum(sizes.values()) == 77_668
    shared = sum(sizes[name] for name in MPT.shared)
    assert shared == 76_800
    assert shared / 8 + sum(sizes.values()) - shared == 10_468


@pytest.mark.parametrize(("length", "rank", "width"), [(4, 1, 32), (7, 3, 8), (100, 5, 768)])
def test_count_is_rows_and_factors(length: int, rank: int, width: int) -> None:
    config = MPTConfig(num_virtual_tokens=length, rank=rank, teacher="out/teacher")
    assert MPT.count(config, Shape(width)) == length * width + rank * (length + width)
    assert sum(value.numel() for value in MPT(config, Shape(width)).parameters()) == MPT.count(config, Shape(width))


@pytest.mark.parametrize(("length", "rank", "width"), [(40, 1, 384), (100, 1, 768), (9, 3, 16)])
def test_a_budget_gives_the_longest_prompt_that_fits(length: int, rank: int, width: int) -> None:
    config = MPT.match_budget(MPTConfig(rank=rank), length, Shape(width))
    assert MPT.count(config, Shape(width)) <= length * width
    longer = config.model_copy(update={"num_virtual_tokens": config.num_virtual_tokens + 1})
    assert MPT.count(longer, Shape(width)) > length * width


def test_a_budget_that_the_factors_alone_exceed_is_refused() -> None:
    with pytest.raises(ConfigError, match="lower rank"):
        MPT.match_budget(MPTConfig(rank=4), 4, Shape(16))


# ---- the prompt -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3])
def test_prompt_is_the_shared_one_times_the_matrix_of_the_task(rank: int) -> None:
    method = made(tiny.backbone("t5"), rank=rank)
    with torch.no_grad():
        for seed, value in enumerate(method.parameters()):
            value.copy_(noise(*value.shape, seed=seed))
    p, u, v = (value.detach().double().numpy() for value in (method.rows, method.u, method.v))
    wanted = np.array([[p[i, j] * sum(u[i, k] * v[k, j] for k in range(rank)) for j in range(D)] for i in range(L)])
    found = method.prompt(View()).rows
    assert found is not None
    np.testing.assert_allclose(found[0].detach().numpy(), wanted, atol=1e-5)
    assert torch.equal(method.fold().as_rows(), found[0])


@pytest.mark.parametrize("kind", ["t5", "llama", "bert", "minilm"])
@pytest.mark.parametrize("rank", [1, 3])
def test_it_starts_as_prompt_tuning_from_the_same_rows(rank: int, kind: str) -> None:
    """U V = 1: same rows, scores and gradient of P."""
    backbone = tiny.backbone(kind)
    method = made(backbone, rank=rank)
    tuning = PromptTuning(PromptTuningConfig(num_virtual_tokens=L), backbone.shape)
    tuning.initialise(Starting(backbone.vocabulary, torch.Generator().manual_seed(0)))
    assert torch.equal(method.fold().as_rows(), tuning.fold().as_rows())
    (one, batch), (two, _) = tuned(backbone, method), tuned(backbone, tuning)
    assert torch.equal(one.scores(batch), two.scores(batch))
    one.train(True).loss(batch).total.backward()
    two.train(True).loss(batch).total.backward()
    torch.testing.assert_close(method.rows.grad, tuning.rows.grad)
    # the chain rule: P enters U and V through its own gradient
    g = (tuning.rows.grad * tuning.rows).detach()
    torch.testing.assert_close(method.u.grad, g @ method.v.detach().T, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(method.v.grad, method.u.detach().T @ g, rtol=1e-4, atol=1e-6)


def test_components_behind_the_first_train_apart() -> None:
    """Equal components would get equal gradients and never become more than one."""
    whole, batch = tuned(tiny.backbone("t5"), made(tiny.backbone("t5"), rank=3))
    method = whole.method
    assert method is not None
    solver = torch.optim.SGD(method.parameters(), lr=0.5)
    for _ in range(3):
        solver.zero_grad()
        whole.train(True).loss(batch).total.backward()
        solver.step()
    assert int(torch.linalg.matrix_rank((method.u @ method.v).detach())) == 3


def test_rates_of_rows_and_factors_are_relative_to_their_own_start() -> None:
    method = made(tiny.backbone("t5"), prompt_lr=0.05, factors_lr=0.02)
    rates = {group.name: group.learning_rate for group in method.trained()}
    scale = float(method.rows.detach().pow(2).mean().sqrt())
    assert rates == {"rows": pytest.approx(0.05 * scale), "u": pytest.approx(0.02), "v": pytest.approx(0.02)}


def test_insight_is_the_factor_of_each_row_and_feature() -> None:
    method = made(tiny.backbone("t5"), (saved(earlier(3)),))
    found = method.insight()
    torch.testing.assert_close(method.rows * (found["rows"] @ found["features"]), method.fold().as_rows())


# ---- from sources ---------------------------------------------------------------------------------------------------


def test_one_source_is_gone_on_from_as_it_is() -> None:
    tensors = earlier(3)
    method = made(tiny.backbone("t5"), (saved(tensors),))
    assert all(torch.equal(value, tensors[name]) for name, value in method.named_parameters())


@pytest.mark.parametrize("rank", [1, 2])
def test_several_tasks_of_one_run_give_their_prompt_and_the_mean_of_their_factors(rank: int) -> None:
    one, two = earlier(3, rank), earlier(7, rank)
    method = made(tiny.backbone("t5"), (saved(one, "a"), saved(two, "b")), rank=rank)
    assert torch.equal(method.rows, one["rows"])
    torch.testing.assert_close(method.u.detach(), (one["u"] + two["u"]) / 2)
    torch.testing.assert_close(method.v.detach(), (one["v"] + two["v"]) / 2)


def test_a_source_that_had_a_teacher_is_a_source_all_the_same() -> None:
    """Its file holds the teacher's rows too."""
    tensors = {**earlier(3), "taught": noise(L, D, seed=20)}
    assert torch.equal(made(tiny.backbone("t5"), (saved(tensors),)).u, tensors["u"])


def test_sources_of_other_methods_sizes_and_runs_are_refused_in_one_line() -> None:
    backbone = tiny.backbone("t5")
    other = earlier(3, rows=noise(L, D, seed=30))
    for sources, message in (
        ((saved({"rows": noise(L, D)}, "out/x", "prompt_tuning"),), "out/x is of prompt_tuning"),
        ((saved(earlier(3, rank=2), "out/x"),), f"out/x has {L} and 2"),
        ((saved(earlier(3), "out/x"), saved(other, "out/y")), "one and the same run"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            made(backbone, sources)
        assert "\n" not in str(caught.value)


# ---- the teacher ----------------------------------------------------------------------------------------------------


def by_hand(student: Tensor, teacher: Tensor) -> float:
    """Mean KL(teacher || student) over rows."""
    p, q = (np.exp(x - x.max(1, keepdims=True)) for x in (teacher.double().numpy(), student.double().numpy()))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    return float((p * np.log(p / q)).sum(1).mean())


@pytest.mark.parametrize("kind", ["t5", "llama", "bert", "minilm"])
def test_the_loss_adds_divergence_of_answers_and_distance_of_states(kind: str) -> None:
    backbone, rows = tiny.backbone(kind), noise(L, D, seed=8)
    whole, batch = tuned(backbone, taught(backbone, rows, distillation_weight=0.7))
    found = whole.train(True).loss(batch)
    assert whole.method is not None
    student, teacher = whole.method.fold(), Prompt(rows=rows[None])
    words = whole.asking.words
    assert words is not None
    with torch.no_grad():
        scores = [backbone.score(batch, prompt, words) for prompt in (student, teacher)]
        states = [backbone.answer(batch, prompt).double().numpy() for prompt in (student, teacher)]
    parts = {
        "task": float(torch.nn.functional.cross_entropy(scores[0], batch.target)),
        "teacher's answers": by_hand(*scores),
        "teacher's states": float(((states[0] - states[1]) ** 2).mean()),
    }
    assert found.parts == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in parts.items()}
    assert parts["teacher's answers"] > 1e-4
    assert parts["teacher's states"] > 1e-3
    wanted = parts["task"] + 0.7 * (parts["teacher's answers"] + parts["teacher's states"])
    assert float(found.total.detach()) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("kind", ["t5", "llama", "bert", "minilm"])
def test_a_teacher_that_is_the_student_teaches_nothing(kind: str) -> None:
    backbone = tiny.backbone(kind)
    plain = made(backbone)
    method = taught(backbone, plain.fold().as_rows())
    (one, batch), (two, _) = tuned(backbone, method), tuned(backbone, plain)
    loss = one.train(True).loss(batch)
    assert loss.parts["teacher's answers"] == pytest.approx(0, abs=1e-6)
    assert loss.parts["teacher's states"] == pytest.approx(0, abs=1e-9)
    loss.total.backward()
    two.train(True).loss(batch).total.backward()
    torch.testing.assert_close(method.rows.grad, plain.rows.grad, rtol=1e-4, atol=1e-6)


def test_no_gradient_reaches_the_teacher_and_training_draws_the_student_to_it() -> None:
    backbone, rows = tiny.backbone("bert"), noise(L, D, seed=8)
    whole, batch = tuned(backbone, taught(backbone, rows, distillation_weight=100.0))
    method = whole.method
    assert method is not None
    solver = torch.optim.Adam(method.parameters(), lr=0.02)
    apart = []
    for _ in range(20):
        solver.zero_grad()
        found = whole.train(True).outputs(batch)
        assert found.taught is not None
        assert found.taught.scores is not None
        assert found.taught.answer is not None
        assert not found.taught.scores.requires_grad
        assert not found.taught.answer.requires_grad
        loss = whole.losses(found, batch)
        apart.append(loss.parts["teacher's answers"] + loss.parts["teacher's states"])
        loss.total.backward()
        solver.step()
    assert method.taught.grad is None
    assert torch.equal(method.taught, rows)
    assert apart[-1] < 0.7 * apart[0]
    assert all(value.grad is None for value in backbone.model.parameters())


def test_a_teacher_made_of_trained_tensors_gets_no_gradient_as_a_teacher() -> None:
    class Own(MPT):
        def teacher(self, view: View) -> Prompt:
            return Prompt(rows=2 * self.rows[None])

    backbone = tiny.backbone("bert")
    method = Own(MPTConfig(num_virtual_tokens=L, teacher="none"), backbone.shape)
    with torch.no_grad():
        for value in method.parameters():
            value.fill_(0.5)
    whole, batch = tuned(backbone, method)
    found = whole.train(True).outputs(batch)
    assert found.taught is not None
    assert found.answer is not None
    assert found.answer.requires_grad
    assert not found.taught.answer.requires_grad
    assert not found.taught.scores.requires_grad


def test_the_teacher_costs_nothing_outside_training() -> None:
    backbone = tiny.backbone("bert")
    whole, batch = tuned(backbone, taught(backbone, noise(L, D, seed=8)))
    (plain, _) = tuned(backbone, made(backbone))
    assert whole.outputs(batch).taught is None
    assert torch.equal(whole.scores(batch), plain.scores(batch))


def test_beside_a_prompt_with_a_teacher_one_without_learns_from_none() -> None:
    """In one pass over the rows of both."""
    backbone = tiny.backbone("bert")
    one, batch = tuned(backbone, taught(backbone, noise(L, D, seed=8)))
    two, _ = tuned(backbone, made(backbone))
    one.train(True)
    two.train(True)
    parts = [range(2), range(2, len(batch))]
    found = outputs(batch, list(zip((one, two), parts, strict=True)))
    assert found[0].taught is not None
    assert found[1].taught is None
    alone = one.loss(batch.rows(torch.tensor([0, 1])))
    torch.testing.assert_close(one.losses(found[0], batch.rows(torch.tensor([0, 1]))).total, alone.total)


def test_an_answer_that_a_row_does_not_have_adds_nothing() -> None:
    """It scores -inf under student and teacher."""
    method = taught(tiny.backbone("bert"), noise(L, D, seed=8))
    scores, teacher = noise(2, 3, seed=1), noise(2, 3, seed=2)
    states = noise(2, D)

    def loss(cut: bool) -> tuple[Tensor, Tensor]:
        own, other = scores.clone(), teacher.clone()
        if cut:
            own, other = (torch.cat([one, torch.full((2, 1), -torch.inf)], 1) for one in (own, other))
        own.requires_grad_()
        found = Outputs(scores=own, answer=states, taught=Outputs(scores=other, answer=states))
        total = method.loss(torch.tensor(0.0), found).total
        total.backward()
        assert own.grad is not None
        return total.detach(), own.grad[:, :3]

    for whole, cut in zip(loss(False), loss(True), strict=True):
        torch.testing.assert_close(cut, whole)


def test_a_teacher_of_another_length_or_place_or_without_rows_is_refused() -> None:
    backbone = tiny.backbone("bert")
    longer = saved({"rows": noise(L + 1, D)}, "out/teacher", "prompt_tuning")
    elsewhere = saved({"rows": noise(L, D)}, "out/teacher", "prompt_tuning", placement="end")
    for teacher, message in ((longer, f"out/teacher has {L + 1} at front"), (elsewhere, f"has {L} at end")):
        with pytest.raises(ConfigError, match=message):
            made(backbone, (teacher,), teacher="out/teacher")
    nothing = Saved("out/teacher", "attempt", {}, {}, None, {})
    with pytest.raises(NotFoldable, match="out/teacher"):
        made(backbone, (nothing,), teacher="out/teacher")


def test_a_task_without_label_words_has_nothing_to_compare(tmp_path: Path) -> None:
    """A head belongs to one prompt, and a text that is written has no scores of answers."""
    backbone = tiny.backbone("t5")
    for kind in ("classify_head", "generate"):
        task = toy.run(tmp_path, task=kind, family="seq2seq").task
        done = registry.load("tasks", task.name)(task, toy.rows(4))
        whole = Tuned(backbone, done, taught(backbone, noise(L, D, seed=8)), max_length=40).train(True)
        with pytest.raises(ConfigError, match="label words"):
            whole.loss(whole.batch(whole.rows(toy.rows(4), labelled=True)))


def test_a_loop_of_your_own_does_not_leave_the_teacher_out_in_silence() -> None:
    backbone = tiny.backbone("llama")
    whole, _ = tuned(backbone, taught(backbone, noise(L, D, seed=8)))
    with pytest.raises(SiteError, match="mpt has a loss of its own"), whole.attach(train=True):
        pass
    with tuned(backbone, made(backbone))[0].attach(train=True):
        pass


def test_it_learns_from_a_saved_teacher_in_a_run(tmp_path: Path) -> None:
    student = case_of(MPT, "bert", tmp_path)
    teacher = case_of(PromptTuning, "bert", tmp_path, {"num_virtual_tokens": 3, "prompt_lr": 0.3})
    first = train(teacher.run("teacher", steps=6), backbone=teacher.backbone())
    config: MethodConfig = student.config(teacher=str(first.dir))
    result = train(student.run("student", steps=6, method=config.model_dump()), backbone=student.backbone())
    found = load_prompt(result.dir, student.backbone()).method
    assert found is not None
    wanted = load_prompt(first.dir, student.backbone()).method
    assert wanted is not None
    assert torch.equal(found.constants(drawn=False)["taught"], wanted.fold().as_rows())
    steps = [row for row in logged(result.dir) if "parts" in row]
    assert all(row["parts"]["teacher's answers"] >= 0 for row in steps)
    assert len(steps) == 6


def test_both_stages_in_two_runs(tmp_path: Path) -> None:
    """Several source tasks, each with a teacher of its own, share one prompt; a new task goes on from that run."""
    backbone, tasks = tiny.backbone("masked"), {}
    for number, name in enumerate(("one", "two")):
        values = {**toy.settings(tmp_path, "masked"), "seed": number}
        values["method"] = {"name": "prompt_tuning", "num_virtual_tokens": 3}
        teacher = train(build({**values, "out": str(tmp_path / f"teacher-{name}")}), backbone=backbone)
        tasks[name] = {"task": values["task"], "data": values["data"], "method": {"teacher": str(teacher.dir)}}
    method = {"name": "mpt", "num_virtual_tokens": 3, "prompt_lr": 0.3}
    joint = {"tasks": tasks, "backbone": values["backbone"], "train": {"steps": 6, "batch_size": 4}}
    first = train(load_run({**joint, "method": method, "out": str(tmp_path / "sources")}), backbone=backbone)
    assert any("teacher's answers" in row["parts"] for row in logged(first.dir) if "parts" in row)
    one, two = (load_prompt(first.dir / "prompts" / name, backbone).method for name in tasks)
    assert isinstance(one, MPT)
    assert isinstance(two, MPT)
    assert torch.equal(one.rows, two.rows)
    assert not torch.equal(one.taught, two.taught)
    values["method"] = {**method, "sources": [str(first.dir)]}
    target = build({**values, "out": str(tmp_path / "target")})
    started = Course(target, backbone).learner.method
    assert isinstance(started, MPT)
    assert torch.equal(started.rows, one.rows)
    torch.testing.assert_close(started.u, (one.u + two.u) / 2)
    assert train(target, backbone=backbone).facts["trainable_parameters"] == 3 * D + 3 + D
