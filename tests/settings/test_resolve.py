"""Files and options become the configuration that fit would take, and nothing runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.errors import UserError
from lightning_peft.settings.resolve import Resolver

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


def adapter(tree: dict[str, Any]) -> dict[str, Any]:
    return tree["model"]["init_args"]["adapter"]


def test_options_lie_over_the_file(resolver: Resolver, tmp_path: Path) -> None:
    words = ["--config", QUICKSTART, "--trainer.max_steps", "7", "--model.adapter.r=3"]
    tree = resolver.tree(words)
    assert tree["trainer"]["max_steps"] == 7
    assert adapter(tree)["class_path"] == "lightning_peft.strategies.DropLoRA"
    assert adapter(tree)["init_args"]["r"] == 3
    assert "config" not in tree
    assert resolver.tree(["--config", QUICKSTART])["trainer"]["max_steps"] == 600  # nothing stays


def test_null_and_a_class_below_another_are_put_into_a_file(resolver: Resolver) -> None:
    gate = '{"class_path": "lightning_peft.strategies.RankDropout", "init_args": {"p": 0.25}}'
    words = ["--model.adapter=PiSSA", "--model.adapter.lora_alpha=null"]
    tree = resolver.tree(["--config", QUICKSTART, *words, f"--model.adapter.rank_gate={gate}"])
    assert adapter(tree)["init_args"]["lora_alpha"] is None
    assert adapter(tree)["init_args"]["rank_gate"]["init_args"]["p"] == 0.25


def test_what_is_wrong_is_the_users(resolver: Resolver) -> None:
    with pytest.raises(UserError, match="model.adapter.rank is no argument of DropLoRA"):
        resolver.tree(["--config", QUICKSTART, "--model.adapter.rank", "3"])
    tree = resolver.tree(["--config", QUICKSTART, "--model.adapter.p", "1.5"])
    with pytest.raises(UserError, match=r"^model.adapter: p must lie in"):
        resolver.module(tree)


def test_the_first_words_may_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    with pytest.raises(UserError, match="confg is unknown"):
        Resolver().tree(["--confg", QUICKSTART])


def test_a_module_is_that_of_the_configuration(resolver: Resolver) -> None:
    module = resolver.module(resolver.tree(["--config", QUICKSTART, "--model.adapter.r", "5"]))
    assert module.adapter.r == 5
    assert Path(module.model_name_or_path).name == "tiny_llama"


def test_a_data_module_is_that_of_the_configuration(resolver: Resolver) -> None:
    data = resolver.data(resolver.tree(["--config", QUICKSTART, "--data.batch_size", "5"]))
    assert (data.batch_size, data.test_tasks) == (5, ["subtraction"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("trainer: .inf", "f.yaml: trainer: inf is no mapping of keys to values; its keys are acc"),
        ("trainer: null", "f.yaml: trainer: null is no mapping"),
        ("model: [1]", "f.yaml: model: .1. is no LightningModule; there are"),
        ("model: {adapter: [1]}", "f.yaml: model.adapter: .1. is no AdapterStrategy; there are"),
        ("model.adapter.r: null", "model.adapter.r: null is no int"),
        ("model.adapter.r: {a: 1}", "f.yaml: model.adapter.r: {'a': 1} is no int"),
        ("model.adapter.r: 2020-01-01", "f.yaml: model.adapter.r: '2020-01-01' is no int"),
        ("model.adapter.target_modules: {a: 1}", "is no str or list of str"),
        ("trainer: {callbacks: [NoSuch]}", "f.yaml: trainer.callbacks: 'NoSuch' is no Callback;"),
        ("trainer: {logger: {class_path: LoRA}}", "f.yaml: trainer.logger: 'LoRA' is no Logger; "),
        ("trainer: {plugins: 5}", "f.yaml: trainer.plugins: 5 is no Precision or ClusterEnviron"),
        ("trainer: {max_steps: 1}\ntrainer: {}", "'trainer' stands in line 1 and again in line 2"),
        ("model: {adapter: {class_path: LoRA, r: 1}}", "f.yaml: model.adapter.r stands beside"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_key_and_value(
    text: str, sentence: str, resolver: Resolver, tmp_path: Path
) -> None:
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(UserError, match=sentence) as error:
        resolver.tree(["--config", QUICKSTART, "--config", str(tmp_path / "f.yaml")])
    assert "\n" not in str(error.value)
    assert "Expected a" not in str(error.value)


def test_no_sentence_names_the_file_that_is_written_on_the_way(resolver: Resolver) -> None:
    words = ["--config", QUICKSTART, "--model.adapter=LoRA", "--model.adapter.r=null"]
    with pytest.raises(UserError, match=r"^model.adapter.r: null is no int"):
        resolver.tree(words)
    with pytest.raises(UserError, match=r"^model.adapter.rank_gate: 'os.system' is no Module"):
        resolver.tree([*words[:3], '--model.adapter.rank_gate={"class_path": "os.system"}'])
    with pytest.raises(UserError, match=r"^model.adapter.rank_gate: '{\[' is no value"):
        resolver.tree([*words[:3], "--model.adapter.rank_gate={["])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--trainer.callbacks+=NoSuch"], "^trainer.callbacks: 'NoSuch' is no Callback; there are"),
        (["--trainer.callbacks+=os.system"], "^trainer.callbacks: 'os.system' is no Callback; "),
        (
            ["--trainer.callbacks+=ModelSummary", "--trainer.callbacks.x=3"],
            "callbacks.x is no argument of ModelSummary",
        ),
    ],
)
def test_one_more_of_a_list_is_checked_too(
    words: list[str], sentence: str, resolver: Resolver
) -> None:
    with pytest.raises(UserError, match=sentence):
        resolver.tree(["--config", QUICKSTART, *words])
    assert resolver.tree(["--config", QUICKSTART, "--trainer.callbacks+=ModelSummary"])


def test_what_cannot_be_written_down_is_one_sentence(resolver: Resolver) -> None:
    """Timer's interval is an enumeration, which jsonargparse writes nowhere below a list."""
    with pytest.raises(UserError, match="cannot be written to a file: .*Interval.step"):
        resolver.tree(["--config", QUICKSTART, "--trainer.callbacks+=Timer"])
