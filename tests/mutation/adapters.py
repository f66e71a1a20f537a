"""Folders in PEFT's format, damaged on purpose, and what loading says of them.

    PYTHONPATH=$PWD python tests/mutation/adapters.py 0 1000     # seed and count

A mutant is made of a good folder by a few changes of bytes, configuration or tensors, the same ones
for a seed. :func:`judge` loads it in this process onto a small model. "fine" means that the tensors
loaded are the file's and the scaling is the configuration's, by a reading of its own; otherwise
there is the sentence, or the traceback.
"""

from __future__ import annotations

import json
import math
import random
import re
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex
import torch
from safetensors.torch import load, save

from lightning_peft import load_peft, save_peft
from lightning_peft.adapters import adapter_layers
from lightning_peft.errors import UserError
from lightning_peft.strategies import LoRA
from lightning_peft.testing import tiny_llama

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Files = dict[str, bytes]
EVIL = ("(.*)*(.*)*Q", "(.|..|...)+[A-Z]", "[", "(?P<", "*", "a{99999999999}", "(?i)Q", "\\")
VALUES: tuple[Any, ...] = (
    None, [], {}, "", "x", "q_proj", 0, 1, -1, 3, 7, 1.5, -0.0, 1e-320, 1e308, 10**400, math.nan,
    math.inf, -math.inf, True, False, [None], [1], ["q_proj"], ["lm_head"], ["nothing"], [[]],
    {"q_proj": 2}, {"q_proj": None}, {"[": None}, {"q_proj": math.nan}, {"a": {"b": []}}, "true",
    "all-linear", "LORA", "lora", "none", "all", "\ud800", "\x1b[31m", "../../etc", *EVIL,
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A damaged folder: what was done, and its files."""

    what: str
    files: Files


def _filled(**arguments: Any) -> Any:
    torch.manual_seed(1)
    model = tiny_llama()
    LoRA(**arguments).attach(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _folder(model: Any, **config: Any) -> Files:
    with tempfile.TemporaryDirectory() as name:
        folder = save_peft(model, name)
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    written = json.loads(files[CONFIG])
    return {**files, CONFIG: json.dumps({**written, **config}, indent=2).encode()}


def bases() -> list[Files]:
    """Good folders: one as this package writes it, one as PEFT does, one with saved modules."""
    ours = _folder(_filled(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    # As PEFT writes it: ends of names, patterns, and all that plain LoRA does without.
    theirs = {
        "alora_invocation_tokens": None, "auto_mapping": None, "bias": "none", "corda_config": None,
        "eva_config": None, "exclude_modules": None, "init_lora_weights": True,
        "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
        "loftq_config": {}, "lora_bias": False, "lora_dropout": 0.1, "megatron_config": None,
        "megatron_core": "megatron.core", "peft_version": "0.21.2", "qalora_group_size": 16,
        "revision": None, "target_parameters": None, "trainable_token_indices": None,
        "use_dora": False, "use_qalora": False, "target_modules": ["v_proj", "up_proj"],
        "alpha_pattern": {"v_proj": 3, r"layers.1.*up_proj": 1.5}, "use_rslora": True,
    }  # fmt: skip
    peft = _folder(_filled(r=2, lora_alpha=4, target_modules=["v_proj", "up_proj"]), **theirs)
    saved = _filled(r=2, target_modules=["o_proj"], modules_to_save=["lm_head", "model.norm"])
    return [ours, peft, _folder(saved, alpha_pattern={"^model.layers.0.self_attn.o_proj": 9})]


def mutants(seed: int, count: int) -> Iterator[Mutant]:
    """Damaged folders, the same ones for a seed."""
    rng, good = random.Random(seed), bases()
    for _ in range(count):
        files, said = dict(rng.choice(good)), []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            change = rng.choice(CHANGES)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                said.append(f"{change.__name__} {change(rng, files)}")
        yield Mutant("; ".join(said), files)


# Changes of bytes.


def _flip(rng: random.Random, files: Files) -> str:
    name = rng.choice(sorted(files))
    content = bytearray(files[name])
    # The header of tensors is where most can go wrong.
    most = len(content) if rng.random() < 0.5 else min(len(content), 700)
    for _ in range(rng.choice((1, 1, 2, 5))):
        if most:
            content[rng.randrange(most)] ^= 1 << rng.randrange(8)
    files[name] = bytes(content)
    return name


def _cut(rng: random.Random, files: Files) -> str:
    name = rng.choice(sorted(files))
    files[name] = files[name][: rng.randrange(len(files[name]) + 1)]
    return name


def _insert(rng: random.Random, files: Files) -> str:
    name = rng.choice(sorted(files))
    place = rng.randrange(len(files[name]) + 1)
    more = rng.choice((b"\0", b"\xff\xfe", b"{", b"NaN", b"1e999", b"[" * 3000, rng.randbytes(9)))
    files[name] = files[name][:place] + more + files[name][place:]
    return name


def _file(rng: random.Random, files: Files) -> str:
    """A file that is gone, empty, of another kind or encoding."""
    name = rng.choice(sorted(files))
    how = rng.choice(("gone", "empty", "pickle", "swapped", "utf-16", "bom", "list", "size"))
    if how == "gone":
        del files[name]
    elif how == "pickle" and WEIGHTS in files:
        files["adapter_model.bin"] = b"cos\nsystem\n(S'touch /tmp/unpickled'\ntR."
        del files[WEIGHTS]
    elif how == "swapped":
        files[name] = files.get(CONFIG, b"") if name == WEIGHTS else files.get(WEIGHTS, b"")
    elif how in ("utf-16", "bom", "list") and CONFIG in files:
        text = files[CONFIG].decode("latin-1")
        form = {"utf-16": text.encode("utf-16"), "bom": b"\xef\xbb\xbf" + files[CONFIG]}
        files[CONFIG] = form.get(how, f"[{text}]".encode("latin-1"))
    elif how == "size" and WEIGHTS in files:
        size = rng.choice((0, 1, 2**31, 2**40, 2**62, 2**64 - 1))
        files[WEIGHTS] = struct.pack("<Q", size) + files[WEIGHTS][8:]
    else:
        files[name] = b""
    return f"{how} {name}"


# Changes of the configuration.


def _config(files: Files) -> dict[str, Any]:
    try:
        found = json.loads(files[CONFIG])
    except (KeyError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _set(rng: random.Random, files: Files) -> str:
    config = _config(files)
    unknown = ["use_new_thing", "", "r ", "R"]
    used = ["r", "lora_alpha", "target_modules", "modules_to_save", "rank_pattern", "alpha_pattern"]
    key, value = rng.choice([*sorted(config), *unknown, *used, *used]), rng.choice(VALUES)
    files[CONFIG] = json.dumps({**config, key: value}).encode()
    return f"{key} = {str(value)[:40]!r}"


def _unset(rng: random.Random, files: Files) -> str:
    config = _config(files)
    key = rng.choice(sorted(config) or [""])
    files[CONFIG] = json.dumps({k: v for k, v in config.items() if k != key}).encode()
    return key


def _twice(rng: random.Random, files: Files) -> str:
    text = files.get(CONFIG, b"{}").decode("latin-1")
    key = rng.choice(("r", "lora_alpha", "peft_type", "target_modules"))
    files[CONFIG] = text.replace("{", f'{{"{key}": {rng.choice(("1", "8", "null"))}, ', 1).encode()
    return key


def _pattern(rng: random.Random, files: Files) -> str:
    config = _config(files)
    key = rng.choice(("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"))
    text = rng.choice((*EVIL, "q_proj", ".*", "layers.0.*", "model.layers.1.mlp.up_proj", "proj"))
    number = rng.choice((1, 2, 3, 4, 0.5, 1e-40, None, math.nan))
    value = {text: number} if key.endswith("pattern") else rng.choice((text, [text]))
    files[CONFIG] = json.dumps({**config, key: value}).encode()
    return f"{key} = {value}"


# Changes of tensors.


def _tensors(files: Files) -> dict[str, torch.Tensor]:
    try:
        return load(files[WEIGHTS])
    except Exception:
        return {}


def _rename(rng: random.Random, files: Files) -> str:
    tensors = _tensors(files)
    old = rng.choice(sorted(tensors) or [""])
    new = rng.choice(
        (
            old.replace("lora_A", "lora_B"), old.replace("layers.0", "layers.7"),
            old.removeprefix(PREFIX), old.upper(), f"../../{old}", f"{old}\n\x1b[31m", "x" * 500,
            f"{PREFIX}lm_head.weight", old.replace("_proj", ""), f"{PREFIX}..weight", "",
            old.replace("layers.0", "layers.1"), old.replace(".weight", ".default.weight"),
        )
    )  # fmt: skip
    if old:
        tensors[new] = tensors.pop(old)
    files[WEIGHTS] = save(tensors)
    return f"{old} -> {new[:60]!r}"


def _drop(rng: random.Random, files: Files) -> str:
    tensors = _tensors(files)
    name = rng.choice(sorted(tensors) or [""])
    layer = name.rpartition(".lora_")[0] if rng.random() < 0.5 and "lora_" in name else name
    files[WEIGHTS] = save({k: v for k, v in tensors.items() if not k.startswith(layer)})
    return layer


def _reshape(rng: random.Random, files: Files) -> str:
    tensors = _tensors(files)
    name = rng.choice(sorted(tensors) or [""])
    if not name:
        return ""
    tensor = tensors[name]
    made = (
        tensor.t() if tensor.dim() == 2 else tensor[None], tensor.flatten(), tensor[:1],
        torch.cat([tensor, tensor]), tensor[:0], tensor[None], tensor.double().sum(),
    )  # fmt: skip
    tensors[name] = rng.choice(made).clone().contiguous()
    files[WEIGHTS] = save(tensors)
    return f"{name} {tuple(tensor.shape)} -> {tuple(tensors[name].shape)}"


def _value(rng: random.Random, files: Files) -> str:
    tensors = _tensors(files)
    name = rng.choice(sorted(tensors) or [""])
    value = rng.choice((math.nan, math.inf, -math.inf, 0.0, 3e38, 1e300))
    if name and tensors[name].numel():
        tensor = tensors[name].clone()
        if value == 1e300 or tensor.dtype not in (torch.float32, *DTYPES[:3]):
            tensor = tensor.double()
        tensor.flatten()[rng.randrange(tensor.numel())] = value
        tensors[name] = tensor
    files[WEIGHTS] = save(tensors)
    return f"{name} {value}"


DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.uint8,
          torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64)  # fmt: skip


def _dtype(rng: random.Random, files: Files) -> str:
    tensors, dtype = _tensors(files), rng.choice(DTYPES)
    names = sorted(tensors)
    for name in names if rng.random() < 0.3 else [rng.choice(names or [""])]:
        if name:
            tensors[name] = tensors[name].to(dtype)
    files[WEIGHTS] = save(tensors)
    return str(dtype)


def _header(rng: random.Random, files: Files) -> str:
    content = files.get(WEIGHTS, b"")
    if len(content) < 8:
        return ""
    size = struct.unpack("<Q", content[:8])[0]
    try:
        header = json.loads(content[8 : 8 + size])
        entry = header[name := rng.choice(sorted(k for k in header if k != "__metadata__"))]
    except (ValueError, LookupError, RecursionError):
        return ""
    key = rng.choice(("dtype", "shape", "data_offsets"))
    entry[key] = rng.choice(
        ("F4", "F6_E2M3", "U16", "I8", "\n", [2**63, 0], [0], [-1], [0, 4], [4, 0], None, [[]])
    )
    text = json.dumps(header).encode()
    files[WEIGHTS] = struct.pack("<Q", len(text)) + text + content[8 + size :]
    return f"{name} {key} = {entry[key]}"


CHANGES: tuple[Callable[[random.Random, Files], str], ...] = (
    _flip, _flip, _cut, _insert, _file, _set, _set, _set, _set, _unset, _twice, _pattern, _rename,
    _drop, _reshape, _value, _dtype, _header,
)  # fmt: skip


# Judging.


def judge(mutant: Mutant) -> str:
    """Load a mutant: "fine", "sentence: …", or the traceback; "wrong: …" where silence lies."""
    with tempfile.TemporaryDirectory(prefix="mutant") as name:
        folder = Path(name)
        for file, content in mutant.files.items():
            (folder / file).write_bytes(content)
        model, began = tiny_llama(), time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_peft(model, folder)
        except UserError as error:
            found = f"sentence: {error}"
        except Exception:
            found = traceback.format_exc()
        else:
            found = _differs(model, mutant.files) or "fine"
        seconds = time.perf_counter() - began
    return f"wrong: it takes {seconds:.0f} s" if seconds > 10 else found


def _differs(model: Any, files: Files) -> str:
    """How a loaded model differs from its files, read here once more."""
    config, tensors = json.loads(files[CONFIG].decode()), load(files[WEIGHTS])
    layers, base = adapter_layers(model), tiny_llama().state_dict()
    keys = {f"{PREFIX}{n}.lora_{side}.weight" for n in layers for side in "AB"}
    others = tensors.keys() - keys
    if not layers or not keys <= tensors.keys():
        return "wrong: other layers are adapted than those of the file"
    for name, layer in layers.items():
        for side in "AB":
            mine = getattr(layer, f"lora_{side}").detach()
            if not torch.equal(mine, tensors[f"{PREFIX}{name}.lora_{side}.weight"].to(mine)):
                return f"wrong: lora_{side} of {name} is not the file's"
        alpha = next(
            (v for k, v in (config.get("alpha_pattern") or {}).items() if _ends(k, name)),
            config["lora_alpha"],
        )
        rank = len(tensors[f"{PREFIX}{name}.lora_A.weight"])
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        if not (layer.scaling > 0 and math.isclose(layer.scaling, scaling, rel_tol=1e-12)):
            return f"wrong: the scaling of {name} is {layer.scaling}, and not {scaling}"
        if getattr(layer.dropout, "p", 0.0) != (config.get("lora_dropout") or 0.0):
            return f"wrong: the dropout of {name}"
    own = {n.replace(".base.", "."): t for n, t in model.state_dict().items() if "lora_" not in n}
    for name, tensor in own.items():
        wanted = tensors[PREFIX + name] if PREFIX + name in others else base[name]
        if not torch.equal(tensor, wanted.to(tensor)) or not torch.isfinite(tensor).all():
            return f"wrong: {name} is neither the base's nor the file's"
    if not others <= {PREFIX + name for name in own}:
        return "wrong: a tensor of the file was passed over"
    return ""


def _ends(pattern: str, name: str) -> bool:
    return regex.match(rf"(.*\.)?({pattern})$", name, timeout=5) is not None


def names_its_place(said: str) -> bool:
    """Whether a sentence names the file or folder, or a key, and stands in one line."""
    text = said.removeprefix("sentence: ")
    return bool(re.search(r"mutant\w+|adapter_(config|model)", text)) and text.isprintable()


def main(seed: int, count: int) -> None:
    """Judge mutants, and say what came out."""
    outcomes: Counter[str] = Counter()
    for mutant in mutants(seed, count):
        said = judge(mutant)
        kind = said.split(":")[0] if said.startswith(("sentence", "wrong")) else said
        kind = "traceback" if kind not in ("sentence", "wrong", "fine") else kind
        if kind == "sentence" and not names_its_place(said):
            kind = "sentence without a place"
        outcomes[kind] += 1
        if kind not in ("sentence", "fine"):
            print(f"{mutant.what}\n{said}\n")
    print(dict(outcomes))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
