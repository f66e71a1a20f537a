"""Every tensor of an adapter is looked at before anything is loaded."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_peft.adapters.peft_tensors import PICKLE, WEIGHTS, as_stored, read_tensors
from lightning_peft.errors import MissingFile, UserError

A, B, HEAD = (f"base_model.model.{end}" for end in ("q.lora_A.weight", "q.lora_B.weight", "h.w"))


def write(folder: Path, **changes: Tensor | None) -> Path:
    tensors = {"A": torch.ones(2, 3), "B": torch.ones(4, 2), "head": torch.ones(5), **changes}
    names = {"A": A, "B": B, "head": HEAD}
    kept = {names.get(k, k): v.contiguous() for k, v in tensors.items() if v is not None}
    save_file(kept, folder / WEIGHTS)
    return folder


def test_pairs_and_others_are_told_apart(tmp_path: Path) -> None:
    found = read_tensors(write(tmp_path))
    assert {side: t.shape for side, t in found.pairs["q"].items()} == {"A": (2, 3), "B": (4, 2)}
    assert found.others.keys() == {"h.w"}


@pytest.mark.parametrize("name", ["A", "B", "head"])
@pytest.mark.parametrize(("value", "what"), [("nan", "NaN"), ("-inf", "an infinite value")])
def test_a_number_that_is_none_is_named(name: str, value: str, what: str, tmp_path: Path) -> None:
    shapes = {"A": (2, 3), "B": (4, 2), "head": (5,)}
    tensor = torch.full(shapes[name], float(value), dtype=torch.bfloat16)
    with pytest.raises(UserError, match=f"{WEIGHTS} holds .* with {what}; take an earlier"):
        read_tensors(write(tmp_path, **{name: tensor}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"A": torch.ones(2, 3, dtype=torch.int32)}, "lora_A.weight as I32; one of BF16, F16, F32"),
        ({"B": torch.ones(4, 2).to(torch.float8_e4m3fn)}, "lora_B.weight as F8_E4M3; one of BF16"),
        ({"head": torch.ones(5, dtype=torch.complex64)}, "h.w as C64; one of BF16, BOOL"),
        ({"A": torch.ones(3)}, r"lora_A of q as \(3,\), which is no matrix"),
        ({"A": torch.ones(1, 3)}, "lora_A of q with rank 1 and lora_B with rank 2; both must"),
        ({"A": torch.ones(0, 3), "B": torch.ones(4, 0)}, "with rank 0 and lora_B with rank 0"),
        ({"A": None}, "holds only lora_B of q"),
        ({"A": None, "B": None}, "holds no lora_A and lora_B of any layer, so it is no LoRA"),
        ({"A": None, "B": None, "head": None}, "holds no lora_A and lora_B of any layer"),
        ({"h.w": torch.ones(1)}, "holds h.w, for which the model has no place, since the names"),
        ({"../../x\n": torch.ones(1)}, r"holds '../../x\\n', for which the model has no place"),
    ],
)
def test_what_is_wrong_is_named(
    changes: dict[str, Tensor | None], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        read_tensors(write(tmp_path, **changes))
    assert str(tmp_path) in str(caught.value)
    assert str(caught.value).isprintable()


def raw(folder: Path, header: bytes, size: int | None = None) -> Path:
    length = struct.pack("<Q", len(header) if size is None else size)
    (folder / WEIGHTS).write_bytes(length + header + b"\0" * 8)
    return folder


@pytest.mark.parametrize(
    ("header", "size"),
    [
        (b"{}", 2**62),
        (b"{}", 2**31),
        (b"\xff{}", None),
        (b'{"a": {"dtype": "F4X\\n", "shape": [1], "data_offsets": [0, 8]}}', None),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}}', None),
        (b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}', None),
        (b'{"a": {"dtype": "F6_E2M3", "shape": [8], "data_offsets": [0, 6]}}', None),
    ],
)
def test_a_broken_header_is_one_sentence(header: bytes, size: int | None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{WEIGHTS} is damaged or cut off: ") as caught:
        read_tensors(raw(tmp_path, header, size))
    assert str(caught.value).isprintable()


def test_a_shape_that_no_tensor_can_have_is_one_sentence(tmp_path: Path) -> None:
    header = b'{"a": {"dtype": "F32", "shape": [0, 18446744073709551615], "data_offsets": [0, 0]}}'
    path = tmp_path / WEIGHTS
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match="which no tensor can"):
        read_tensors(tmp_path)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / PICKLE).write_bytes(f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())
    with pytest.raises(MissingFile, match=r"adapter_model.bin, a pickle, which may run any code"):
        read_tensors(tmp_path)
    write(tmp_path)  # beside it stands the file that is read
    assert read_tensors(tmp_path).pairs.keys() == {"q"}
    assert not marker.exists()


def test_numbers_are_stored_as_they_are() -> None:
    assert as_stored(torch.tensor([1e5]), torch.float16) == "an infinite value"
    assert as_stored(torch.tensor([1e4]), torch.float16) is None
