"""A prompt in the host's own hands: their training loop, transformers.Trainer, checkpointing, compilation.

Knows no run file and no training loop of ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import promptuary
import tiny
from promptuary import registry
from promptuary.errors import ConfigError, FingerprintError, SiteError

SETTINGS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"num_virtual_tokens": 4},
    "dept": {"num_virtual_tokens": 3, "rank": 2, "max_tokens": 32},
    "ept": {"num_virtual_tokens": 3, "rank": 2, "max_tokens": 32, "spaces": 2},
    "lamp": {"num_virtual_tokens": 4, "rank": 2},
}
KINDS = ("gpt2", "llama", "t5", "bert")
SENTENCES = ["a red apple was good", "the old dog sleeps", "blue sky and sea", "six birds eat one plum ."]


def settings_of(method: str) -> dict[str, Any]:
    return dict(registry.load("methods", method).tiny)


def batch(kind: str, count: int = 4) -> dict[str, torch.Tensor]:
    """Padded texts with labels as the family takes them."""
    tokenizer = tiny.tokenizer()
    coded = tokenizer(SENTENCES[:count], return_tensors="pt", padding=True, return_token_type_ids=False)
    labels = coded["input_ids"].masked_fill(coded["attention_mask"] == 0, -100)
    if tiny.FAMILY[kind] == "seq2seq":
        labels = labels[:, :4].clone()
    return {**coded, "labels": labels}


def facts(model: Any) -> Any:
    """Everything about a model that must be the same afterwards."""
    return (
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        {name: value.clone() for name, value in model.state_dict().items()},
        sorted(model.__dict__),
        repr(model.config),
    )


def same(one: Any, two: Any) -> bool:
    return (
        one[0] == two[0]
        and one[1] == two[1]
        and one[3:] == two[3:]
        and list(one[2]) == list(two[2])
        and all(torch.equal(one[2][name], two[2][name]) for name in one[2])
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", list(SETTINGS))
def test_a_loop_of_your_own_trains_the_prompt_and_leaves_the_model_as_it_was(kind: str, method: str) -> None:
    model = tiny.model(kind).train()
    before = facts(model)
    made = promptuary.adapt(model, tiny.tokenizer(), method, seed=1, **settings_of(method))
    given = batch(kind)
    start = made.state()
    with made.attach(train=True) as attached:
        assert attached is model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert sum(parameter.numel() for parameter in trained) == made.trainable_parameters
        optimizer = torch.optim.Adam(trained, lr=0.05)
        losses = []
        for _ in range(12):
            loss = model(**given).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert any(not torch.equal(value, start[name]) for name, value in made.state().items())
    with torch.no_grad(), made.attach():
        last = float(model(**given).loss)
    assert last < losses[0]
    made.backbone.release()
    assert same(facts(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    given, found = batch(kind), []
    for checkpointing in (False, True):
        model = tiny.model(kind)
        made = promptuary.adapt(model, tiny.tokenizer(), "dept", seed=1, **settings_of("dept"))
        source = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for group in made.trained():
                group.parameter.copy_(0.3 * torch.randn(group.parameter.shape, generator=source))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with made.attach(train=True):
            model.train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                elif isinstance(getattr(module, "dropout", None), float):
                    module.dropout = 0.0
                elif isinstance(getattr(module, "attention_dropout", None), float):
                    module.attention_dropout = 0.0
            model(**given, use_cache=False).loss.backward() if kind != "bert" else model(**given).loss.backward()
        found.append([group.parameter.grad.clone() for group in made.trained()])
    for plain, checkpointed in zip(*found, strict=True):
        assert bool((plain != 0).any())
        torch.testing.assert_close(checkpointed, plain, atol=1e-5, rtol=1e-4)


COMPILED = """
import torch, tiny, promptuary
import test_hosting as t

kind = "llama"
model, raw, given = tiny.model(kind), tiny.model(kind), t.batch(kind)
made = promptuary.adapt(model, tiny.tokenizer(), "dept", seed=1, **t.settings_of("dept"))
compiled, found = torch.compile(model, backend="eager"), []
for run in (model, compiled):
    with made.attach(train=True):
        loss = run(**given).loss
        loss.backward()
    found.append([loss.detach(), *(group.parameter.grad.clone() for group in made.trained())])
    for group in made.trained():
        group.parameter.grad = None
for eager, fast in zip(*found, strict=True):
    torch.testing.assert_close(fast, eager, atol=1e-6, rtol=1e-5)
del given["labels"]
with torch.no_grad():
    torch.testing.assert_close(compiled(**given).logits, raw(**given).logits, atol=1e-6, rtol=1e-5)
    with made.attach():
        torch.testing.assert_close(compiled(**given).logits, model(**given).logits, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(model(**given).logits, raw(**given).logits)
print("same")
"""


def test_a_compiled_model_gives_the_same_loss_and_gradients_and_is_itself_afterwards() -> None:
    # in a process of its own: the compiler cannot look through the shape checks of a test run
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout.strip() == "same", done.stderr[-2000:]


class Sentences(torch.utils.data.Dataset):
    """The sentences as a data set of transformers' Trainer."""

    def __init__(self, kind: str) -> None:
        self.rows = batch(kind)

    def __len__(self) -> int:
        return len(SENTENCES)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        return {name: value[place] for name, value in self.rows.items()}


def trainer(model: Any, kind: str, folder: Path, steps: int, **settings: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        seed=3,
        **settings,
    )
    return transformers.Trainer(model, arguments, train_dataset=Sentences(kind), eval_dataset=Sentences(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["dept", "ept"])
def test_trainer_trains_evaluates_and_resumes_the_prompt(kind: str, method: str, tmp_path: Path) -> None:
    def prompt() -> tuple[Any, Any]:
        model = tiny.model(kind)
        return model, promptuary.adapt(model, tiny.tokenizer(), method, seed=1, **settings_of(method))

    model, made = prompt()
    before = facts(model)
    start = made.state()
    with made.attach(train=True):
        whole = trainer(model, kind, tmp_path / "whole", 6, save_strategy="no")
        whole.train()
        with torch.no_grad():
            expected_loss = float(model.eval()(**batch(kind)).loss)
        if kind == "gpt2":  # Trainer counts first tokens for a class of this name, with a prompt or without
            items = int((batch(kind)["labels"] != -100).sum())
            expected_loss *= (items - len(SENTENCES)) / items
        assert whole.evaluate()["eval_loss"] == pytest.approx(expected_loss, rel=1e-4)
        predicted = whole.predict(Sentences(kind)).predictions
        logits = predicted[0] if isinstance(predicted, tuple) else predicted
        assert logits.shape[1] == batch(kind)["labels"].shape[1]
    expected = made.state()
    assert any(not torch.equal(value, start[name]) for name, value in expected.items())
    after = facts(model)
    assert {name: value.shape for name, value in after[2].items()} == {n: v.shape for n, v in before[2].items()}
    assert all(torch.equal(value, before[2][name]) for name, value in after[2].items())
    assert after[0] == before[0]

    model, made = prompt()
    with made.attach(train=True):
        trainer(model, kind, tmp_path / "broken", 6, save_strategy="steps", save_steps=3).train()
    model, made = prompt()
    with made.attach(train=True):
        again = trainer(model, kind, tmp_path / "broken", 6, save_strategy="steps", save_steps=3)
        again.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-3"))
    assert all(torch.equal(value, expected[name]) for name, value in made.state().items())


def test_a_model_saved_while_a_prompt_is_attached_is_still_a_model(tmp_path: Path) -> None:
    model = tiny.model("llama")
    made = promptuary.adapt(model, tiny.tokenizer(), "dept", **settings_of("dept"))
    with made.attach():
        model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(again.state_dict()) == list(tiny.model("llama").state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("method", list(SETTINGS))
def test_a_prompt_without_a_task_is_saved_loaded_and_attached(method: str, tmp_path: Path) -> None:
    model, given = tiny.model("llama"), batch("llama")
    made = promptuary.adapt(model, tiny.tokenizer(), method, seed=1, **settings_of(method))
    with torch.no_grad(), made.attach():
        expected = model(**given).logits
    promptuary.save_prompt(made, tmp_path / "prompt")
    made.backbone.release()
    again = promptuary.load_prompt(tmp_path / "prompt", model=model, tokenizer=tiny.tokenizer())
    with torch.no_grad(), again.attach():
        assert torch.equal(model(**given).logits, expected)
    assert not again.has_task
    for use in (lambda: again.predict(["a cat"]), lambda: again.task):
        with pytest.raises(ConfigError, match="this prompt has no task"):
            use()
    with pytest.raises(ConfigError, match="needs its tokenizer too"):
        promptuary.load_prompt(tmp_path / "prompt", model=model)
    with pytest.raises(FingerprintError, match="does not fit"):
        promptuary.load_prompt(tmp_path / "prompt", model=tiny.model("llama", seed=4), tokenizer=tiny.tokenizer())


def test_a_head_of_your_own_is_trained_beside_the_prompt_and_does_not_make_another_base(tmp_path: Path) -> None:
    config = tiny.model("bert").config
    config.num_labels = 3
    model = transformers.BertForSequenceClassification(config).eval()
    tokenizer, given = tiny.tokenizer(), batch("bert")
    given["labels"] = torch.tensor([0, 1, 2, 0])
    made = promptuary.adapt(model, tokenizer, "prompt_tuning", num_virtual_tokens=3)
    promptuary.save_prompt(made, tmp_path / "before")
    model.classifier.requires_grad_(True)
    with made.attach(train=True):
        model(**given).loss.backward()
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert model.classifier.weight.grad is not None
    again = promptuary.load_prompt(tmp_path / "before", model=model, tokenizer=tokenizer)
    assert again.backbone.identity == made.backbone.identity


def test_what_a_host_can_get_wrong_is_one_line() -> None:
    model = tiny.model("llama")
    with pytest.raises(ConfigError, match='did you mean "num_virtual_tokens"'):
        promptuary.adapt(model, tiny.tokenizer(), "prompt_tuning", num_virtual_token=3)
    assert "forward" not in model.__dict__
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ConfigError, match='"prompt_tunning"'):
        promptuary.adapt(model, tiny.tokenizer(), "prompt_tunning")
    with pytest.raises(SiteError, match="ViTModel sees images and needs its image processor; .* is none"):
        promptuary.adapt(
            transformers.ViTModel(
                transformers.ViTConfig(
                    hidden_size=8,
                    num_hidden_layers=1,
                    num_attention_heads=1,
                    intermediate_size=8,
                    image_size=8,
                    patch_size=4,
                )
            ),
            tiny.tokenizer(),
        )
    made = promptuary.adapt(model, tiny.tokenizer(), "prompt_tuning", num_virtual_tokens=3)
    other = promptuary.adapt(model, tiny.tokenizer(), "prompt_tuning", num_virtual_tokens=2)
    with (
        pytest.raises(SiteError, match="only a single prompt"),
        promptuary.attach({"a": made, "b": other}, model, train=True),
    ):
        pass
    with pytest.raises(ConfigError, match="at least one prompt"), promptuary.attach({}, model):
        pass
