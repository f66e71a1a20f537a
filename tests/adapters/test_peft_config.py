"""Every key of an adapter's configuration is checked before anything is loaded."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.adapters.peft_config import not_plain, peft_pattern, read_config
from lightning_peft.errors import MissingFile, UserError

GOOD: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 7,
    "target_modules": ["q_proj", "v_proj"],
}
ABOVE_ZERO = r"it must be a number above zero \(1e-30 to 1e30\)\."
RANK = r"it must be a whole number of at least 1, the rank\."


def write(folder: Path, text: str) -> Path:
    (folder / "adapter_config.json").write_text(text)
    return folder


def read(folder: Path, **changes: Any) -> Any:
    return read_config(write(folder, json.dumps({**GOOD, **changes})))


def test_a_good_one_is_read(tmp_path: Path) -> None:
    found = read(tmp_path, lora_dropout=0.1, use_rslora=True, rank_pattern={"q_proj": 2})
    assert (found.r, found.lora_alpha, found.lora_dropout, found.use_rslora) == (4, 7, 0.1, True)
    assert (found.rank_pattern, found.alpha_pattern) == ({"q_proj": 2}, {})
    assert (found.target_modules, found.modules_to_save) == (["q_proj", "v_proj"], [])
    assert read(tmp_path, target_modules=".*q").target_modules == ".*q"
    # What PEFT writes for "not set".
    unset = dict.fromkeys(("rank_pattern", "lora_dropout", "modules_to_save", "use_dora"))
    assert read(tmp_path, **unset).lora_dropout == 0.0


@pytest.mark.parametrize("key", ["r", "lora_alpha", "target_modules"])
def test_what_decides_the_change_must_be_there(key: str, tmp_path: Path) -> None:
    kept = {k: v for k, v in GOOD.items() if k != key}
    with pytest.raises(UserError, match=rf"adapter_config.json has no {key}; it must be"):
        read_config(write(tmp_path, json.dumps(kept)))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("value", [NAN, INF, -INF, 0, -1, "7", None, True, [], 1e308, 10**400])
def test_an_alpha_is_a_number_above_zero(value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"adapter_config.json has lora_alpha: .*; {ABOVE_ZERO}"):
        read(tmp_path, lora_alpha=value)
    with pytest.raises(UserError, match=f"json has alpha_pattern 'q_proj': .*; {ABOVE_ZERO}"):
        read(tmp_path, alpha_pattern={"q_proj": value})


@pytest.mark.parametrize("value", [0, -1, 1.5, 4.0, NAN, "4", None, True, [4], 10**40])
def test_a_rank_is_a_whole_number_above_zero(value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"adapter_config.json has r: .*; {RANK}"):
        read(tmp_path, r=value)
    with pytest.raises(UserError, match=f"json has rank_pattern 'q_proj': .*; {RANK}"):
        read(tmp_path, rank_pattern={"q_proj": value})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lora_dropout": NAN}, r"lora_dropout: nan; it must be a number in \[0, 1\)"),
        ({"lora_dropout": 1}, "lora_dropout: 1; it must be a number in"),
        ({"use_rslora": "false"}, "use_rslora: 'false'; it must be true or false"),
        ({"rank_pattern": [1]}, r"rank_pattern: \[1\]; it must be a mapping from names of layers"),
        ({"alpha_pattern": {"[": None}}, r"alpha_pattern: '\[' is not a regular expression"),
        ({"target_modules": []}, r"target_modules: \[\]; it must be the names of the adapted"),
        ({"target_modules": [1]}, r"target_modules: \[1\]; it must be a list of names or a"),
        ({"exclude_modules": {}}, r"exclude_modules: \{\}; it must be a list of names or a"),
        ({"modules_to_save": "lm_head"}, "modules_to_save: 'lm_head'; it must be a list of names"),
        ({"layers_to_transform": "1"}, "layers_to_transform: '1'; it must be a list of layers'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights: 'lora_ga', which changes the base"),
        ({"init_lora_weights": "kasa"}, "init_lora_weights: 'kasa'; true, false, 'gaussian'"),
        ({"init_lora_weights": {}}, r"init_lora_weights: \{\}; true, false"),
        ({"layer_replication": [[0, 2]]}, "layer_replication: .*; only null can be loaded"),
        ({"target_parameters": ["w"]}, r"target_parameters: \['w'\]; only null can be loaded"),
        ({"kasa_config": {"a": 1}}, "kasa_config: .*; only null can be loaded"),
        ({"use_qalora": True}, "use_qalora: True; only False can be loaded"),
    ],
)
def test_what_is_wrong_is_named_with_what_would_do(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"adapter_config.json has {sentence}"):
        read(tmp_path, **changes)


def test_an_unknown_key_is_said_and_one_that_sets_nothing_is_not(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="json has 'use_new', unknown here and passed over"):
        read(tmp_path, use_new=True, another=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(tmp_path, another=None, base_model_name_or_path="gone/away", auto_mapping={"a": "b"})


def test_every_key_that_peft_writes_is_known(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    peft.LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj"]).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_config(tmp_path).r == 4


def test_a_folder_without_one_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="holds no adapter_config.json"):
        read_config(tmp_path)


def test_plain_is_what_adds_one_product_to_linears() -> None:
    assert not_plain(GOOD) is None
    assert not_plain({**GOOD, "use_dora": True, "bias": "all"}) == "use_dora"
    assert not_plain({**GOOD, "alora_invocation_tokens": [1]}) == "alora_invocation_tokens"


def test_a_pattern_matches_the_end_of_a_name_as_in_peft() -> None:
    from peft.utils.other import get_pattern_key

    names = ("q", "a.q", "a.xq", "a.q.b", "a.b.q")
    for text in ("q", "a.q", "^a.q", ".*q", "b.q", "x"):
        found = [bool(peft_pattern(text, "k").match(name)) for name in names]
        assert found == [get_pattern_key([text], name) == text for name in names], text
