from __future__ import annotations

from pathlib import Path

import pytest
import torch

from promptuary.errors import BudgetExceeded, ConfigError, SpeakerError
from promptuary.speakers.base import SpeakerConfig, user
from promptuary.speakers.budget import Ledger
from promptuary.speakers.cache import Cache
from promptuary.speakers.endpoint import Endpoint
from promptuary.speakers.local import Local, transcript, without_system
from promptuary.speakers.opening import open_speaker
from promptuary.speakers.scripted import Scripted
from promptuary.testing import tiny

ASK = user("a big fish", "a red apple")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} ; {% endfor %}"
    "{% if add_generation_prompt %}answer :{% endif %}"
)


def test_a_local_model_answers_as_its_own_generate_does() -> None:
    backbone = tiny.backbone("llama")
    ids = torch.tensor([[1, *backbone.tokenizer(transcript(ASK), add_special_tokens=False).input_ids]])
    written = backbone.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    expected = backbone.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
    speaker = Local(backbone)
    assert speaker.generate(ASK, max_tokens=6, n=3) == [expected]
    first = expected.split()[1]
    assert speaker.generate(ASK, max_tokens=6, stop=[first]) == [expected.split(first)[0].strip()]
    spent = speaker.account.ledger.spent()
    assert (spent.calls, spent.tokens_in) == (2, 2 * ids.shape[1])


def test_samples_depend_on_the_seed_alone() -> None:
    speaker = Local(tiny.backbone("llama"))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = speaker.generate(ASK, n=3, temperature=1.0, seed=5, max_tokens=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(first)) > 1
    assert speaker.generate(ASK, n=3, temperature=1.0, seed=5, max_tokens=6) == first
    assert speaker.generate(ASK, n=3, temperature=1.0, seed=6, max_tokens=6) != first
    unseeded = [speaker.generate(ASK, temperature=1.0, max_tokens=6) for _ in range(3)]
    assert len({text for texts in unseeded for text in texts}) > 1
    again = Local(tiny.backbone("llama"))
    assert [again.generate(ASK, temperature=1.0, max_tokens=6) for _ in range(3)] == unseeded


def test_a_chat_template_is_used_also_one_without_system_messages() -> None:
    backbone = tiny.backbone("llama")
    backbone.tokenizer.chat_template = TEMPLATE
    speaker = Local(backbone)
    assert backbone.tokenizer.decode(speaker._ids(ASK)).endswith("a red apple ; <unk> : a big fish ; answer :")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    backbone.tokenizer.chat_template = refusing
    assert backbone.tokenizer.decode(speaker._ids(ASK)) == "<unk> : a red apple a big fish ; answer :"
    backbone.tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(SpeakerError, match="its chat template does not take these messages: never"):
        speaker.generate(ASK)


def test_a_system_message_goes_into_the_question() -> None:
    assert without_system(ASK) == user("a red apple\n\na big fish")


def test_budget_and_cache_hold_for_local_models(tmp_path: Path) -> None:
    config = SpeakerConfig(model="x", budget_calls=1)
    speaker = Local(
        tiny.backbone("llama"), account=Ledger().account("role", config), cache=Cache(tmp_path / "a.sqlite")
    )
    first = speaker.generate(ASK, max_tokens=4)
    assert speaker.generate(ASK, max_tokens=4) == first
    with pytest.raises(BudgetExceeded):
        speaker.generate(user("another"), max_tokens=4)
    speaker.close()
    other = Local(tiny.backbone("llama", seed=1), cache=Cache(tmp_path / "a.sqlite"))
    other.generate(ASK, max_tokens=4)
    assert other.account.ledger.spent().hits == 0  # other weights, another model
    other.close()


def test_what_cannot_be_asked() -> None:
    speaker = Local(tiny.backbone("llama"))
    with pytest.raises(SpeakerError, match="positions; ask less"):
        speaker.generate(user("cat " * 90))
    with pytest.raises(SpeakerError, match="talk to a causal model"):
        Local(tiny.backbone("bert"))
    with pytest.raises(ConfigError, match="messages: expected at least one"):
        speaker.generate([])
    with pytest.raises(ConfigError, match="n: expected at least 1"):
        speaker.generate(ASK, n=0)
    with pytest.raises(ConfigError, match="temperature of at least 0"):
        speaker.generate(ASK, temperature=-1)


def test_a_script_is_followed_and_counted(tmp_path: Path) -> None:
    speaker = Scripted(["one", "two STOP three", ""], cache=Cache(tmp_path / "a.sqlite"))
    assert speaker.generate(ASK, n=2, temperature=1.0, seed=1, stop=["STOP"]) == ["one", "two"]
    assert speaker.generate(user("other")) == []
    assert speaker.generate(ASK, n=2, temperature=1.0, seed=1, stop=["STOP"]) == ["one", "two"]
    assert speaker.calls == 3
    with pytest.raises(SpeakerError, match="the script has no further answer"):
        speaker.generate(user("more"))
    assert speaker.account.ledger.spent().empty == 1
    speaker.close()
    function = Scripted(lambda messages: [messages[-1]["content"], "b", "c"])
    assert function.generate(user("a"), n=2, temperature=1.0) == ["a", "b"]
    assert function.calls == 1
    assert function.asked == [tuple(user("a"))]


def test_opening(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ledger, loaded = Ledger(), []

    def load(config: object) -> object:
        loaded.append(config)
        return tiny.backbone("llama")

    local = open_speaker(SpeakerConfig(model="some"), "rewriter", ledger, load=load, cache=tmp_path / "a.sqlite")
    assert isinstance(local, Local)
    local.generate(ASK, max_tokens=2)
    assert [(row["role"], row["model"], row["calls"]) for row in ledger.rows()] == [("rewriter", "some", 1)]
    assert local.cache is not None
    assert local.cache.path == tmp_path / "a.sqlite"
    local.close()
    far = open_speaker(SpeakerConfig(model="some", base_url="http://127.0.0.1:9/v1"), "victim", ledger)
    assert isinstance(far, Endpoint)
    assert far.cache is None
    far.close()
    with pytest.raises(ConfigError, match="rewriter: some has no base_url"):
        open_speaker(SpeakerConfig(model="some"), "rewriter", ledger)
