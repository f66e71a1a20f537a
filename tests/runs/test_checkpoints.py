"""A checkpoint is written whole, and read only if it is what was written and holds numbers."""

from __future__ import annotations

import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft.errors import MissingFile, UserError
from lightning_peft.runs import AtomicCheckpointIO, check_checkpoint, read_checkpoint, step_of

Content = Callable[..., dict[str, Any]]
Save = Callable[..., Path]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path, make_content: Content) -> None:
    path = tmp_path / "checkpoints" / "step=3.ckpt"
    AtomicCheckpointIO().save_checkpoint(make_content(3), path)
    assert same(AtomicCheckpointIO().load_checkpoint(path), make_content(3))
    assert list(path.parent.iterdir()) == [path]


def test_what_is_no_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"the checkpoint .*x.ckpt does not exist\."):
        read_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="is a folder of shards that another program wrote"):
        read_checkpoint(tmp_path)
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(UserError, match=r"list.ckpt holds a list and no checkpoint; give one"):
        read_checkpoint(tmp_path / "list.ckpt")


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path: Path, save: Save) -> None:
    """Three hundred, one at a time: in tensors, in the pickle, in the archive's index."""
    path = save(tmp_path / "a.ckpt", 3)
    whole, expected = path.read_bytes(), read_checkpoint(path)
    draw, refused = random.Random(0), 0
    for _ in range(300):
        broken = bytearray(whole)
        broken[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(broken)
        try:
            assert same(read_checkpoint(path), expected)
        except UserError as error:
            assert "a.ckpt is cut off or damaged (" in str(error)  # noqa: PT017
            refused += 1
    assert refused > 150


def test_a_flipped_bit_in_a_tensor_is_refused(tmp_path: Path, save: Save) -> None:
    path = save(tmp_path / "a.ckpt", 3)
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data/0"))
        place = archive.getinfo(name).header_offset
    whole = bytearray(path.read_bytes())
    at = whole.index(torch.arange(6.0).numpy().tobytes(), place)
    whole[at] ^= 1
    path.write_bytes(whole)
    assert torch.load(path)["state_dict"]["model.q.lora_A"][0, 0] != 0  # without a word
    with pytest.raises(UserError, match=r"damaged \(the sum of .*data/0 differs\)"):
        read_checkpoint(path)


class _Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch run-by-checkpoint",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_named_and_never_run(
    tmp_path: Path, make_content: Content, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.ckpt"
    torch.save(make_content(code=_Code()), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"holds code \((posix|nt).system\), which is not run"):
        read_checkpoint(path)
    assert not (tmp_path / "run-by-checkpoint").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"adapter": None}, r"a.ckpt was not written by lightning_peft: it has no entry 'adapter'"),
        ({"adapter": {}}, r"not whole: its entry 'adapter.strategy' is missing; resume from the"),
        ({"adapter": 1}, r"its entry 'adapter' is a int; resume from the one before it"),
        ({"state_dict": [1]}, r"its entry 'state_dict' is a list; resume from the one before"),
        ({"global_step": None}, r"its entry 'global_step' is missing"),
    ],
)
def test_a_checkpoint_that_is_not_whole_says_what_it_lacks(
    make_content: Content, change: dict[str, Any], sentence: str
) -> None:
    assert check_checkpoint(make_content(), "a.ckpt")
    with pytest.raises(UserError, match=sentence):
        check_checkpoint(make_content(**change), "a.ckpt")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["state_dict"].update({"model.q.lora_A": torch.zeros(3, 3)}),
        lambda c: c["state_dict"]["model.q.lora_A"].add_(1),
        lambda c: c["state_dict"].update({"model.q.lora_A": torch.arange(6.0).view(3, 2)}),
        lambda c: c.update(global_step=7),
        lambda c: c["adapter"]["layers"].append("k"),
        lambda c: c["optimizer_states"].clear(),
    ],
)
def test_content_that_was_changed_behind_the_digest_is_refused(
    tmp_path: Path, save: Save, change: Callable[[dict[str, Any]], Any]
) -> None:
    path = save(tmp_path / "a.ckpt", 3)
    content = torch.load(path, weights_only=True)
    torch.save(content, path)
    assert read_checkpoint(path)["global_step"] == 3
    change(content)
    torch.save(content, path)
    with pytest.raises(UserError, match=r"damaged \(it is not what was written\)"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.tensor(3), "c": torch.ones(0)},
        {"a": torch.ones(4, 4).t()[1:], "b": (1, [2.0, None, "ü"], True), 3: float("nan")},
        {"a": torch.nn.Parameter(torch.ones(1)), "b": torch.ones(2, dtype=torch.bool)},
    ],
)
def test_any_content_comes_back_under_its_digest(tmp_path: Path, content: dict[Any, Any]) -> None:
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "a.ckpt")
    assert list(read_checkpoint(tmp_path / "a.ckpt")) == list(content)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_named(make_content: Content, number: float) -> None:
    found = make_content()
    found["state_dict"]["model.q.lora_B"][1, 1] = number
    with pytest.raises(UserError, match="holds NaN or an infinite number in model.q.lora_B: train"):
        check_checkpoint(found, "a.ckpt")
    found = make_content()
    found["optimizer_states"][0]["state"][0]["exp_avg"][0, 0] = number
    with pytest.raises(UserError, match="infinite number in optimizer_states.0.exp_avg"):
        check_checkpoint(found, "a.ckpt")


def test_the_step_is_in_the_name() -> None:
    assert step_of(Path("step=4-val=0.5.ckpt")) == 4
    assert step_of(Path("best.ckpt")) == -1
