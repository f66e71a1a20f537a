"""Models in llama.cpp's format: a ``.gguf`` file becomes, once, a folder like any other.

transformers reads such a file anew at every start, for a minute, into a model that it takes for a
quantized one. So the file is converted once, into a cache, and what trains is an ordinary folder,
under every engine.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_peft.atomic import alone_at, write_folder
from lightning_peft.errors import MissingFile, UserError

CACHE = "LIGHTNING_PEFT_CACHE"
RECORD = "conversion.json"
_KEY = "model.model_name_or_path"


def converted(path: Path) -> Path:
    """The folder that a ``.gguf`` file was converted to; it is converted now if there is none.

    A folder is named after the file's content, so another version of a file is another model. Every
    process looks at the whole folder once before it is used, by the digests written beside it; a
    damaged one is made anew. Of processes that come at once, one converts and the others wait.

    Args:
        path: Of the file; its weights are those of a causal language model.

    Returns:
        A folder of :func:`cache_folder`, in float32, or as the file where its weights are not
        quantized.

    Raises:
        UserError: If it is no such file, transformers does not know its architecture, the package
            ``gguf`` is missing, or the cache cannot be written.
    """
    if not path.is_file():
        raise MissingFile(f"{_KEY}: the file {path} does not exist.")
    try:
        state = path.stat()
        return _converted(path.absolute(), cache_folder(), state.st_size, state.st_mtime_ns)
    except OSError as error:
        where = error.filename if error.filename is not None else path
        raise UserError(
            f"{_KEY}: {where}: {error.strerror}; the converted model of {path.name} goes to the "
            f"folder that the variable {CACHE} names."
        ) from error


def cache_folder() -> Path:
    """Where converted models lie: ``$LIGHTNING_PEFT_CACHE``, or a folder of the user's cache."""
    if given := os.environ.get(CACHE):
        return Path(given).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "lightning_peft"


@functools.lru_cache(maxsize=8)
def _converted(path: Path, cache: Path, size: int, changed: int) -> Path:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{_KEY}: {path} is no .gguf file, since it does not begin with GGUF.")
    folder = cache / f"{path.stem}-{_digest(path)[:16]}"
    if not (reason := _damage(folder)):  # as in a shared cache that this user cannot write
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with alone_at(folder):
        if reason := _damage(folder):
            for part in cache.glob(f".{folder.name}.*.part"):  # of processes that were killed
                shutil.rmtree(part, ignore_errors=True)
            if folder.exists():
                rank_zero_warn(f"{folder} is damaged ({reason}) and is made anew.")
            rank_zero_info(f"{path.name} is converted once, to {folder}.")
            write_folder(folder, lambda part: _convert(path, part), over=True)
    return folder


def _damage(folder: Path) -> str:
    """Why a converted model cannot be used; nothing if it is as it was written."""
    try:
        files = json.loads((folder / RECORD).read_text())["files"]
        for name, digest in files.items():
            if _digest(folder / name) != digest:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"no {Path(error.filename).name}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{RECORD} is not what was written"
    return ""


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=20)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _convert(path: Path, folder: Path) -> None:
    """Write what a ``.gguf`` file holds as a folder that ``from_pretrained`` takes."""
    if find_spec("gguf") is None:
        raise UserError(f"{_KEY}: {path} needs the package gguf; pip install gguf")
    try:
        model, tokenizer, lost = _load(path)
    except Exception as error:  # of any type, where a file is damaged
        if isinstance(error, OSError) and error.errno is not None:
            raise
        text = " ".join(str(error).split()).rstrip(".") or "it is damaged"
        raise UserError(f"{_KEY}: {path} cannot be converted: {text}.") from error
    if lost:
        raise UserError(f"{_KEY}: {path} lacks weights: {lost[0]} ({len(lost)} in all).")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record = {
        "source": path.name,
        "transformers": version("transformers"),
        "gguf": version("gguf"),
        "files": {file.name: _digest(file) for file in sorted(folder.iterdir())},
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _load(path: Path) -> tuple[Any, Any, list[str]]:
    """The model and tokenizer of a ``.gguf`` file, and the names of weights that it lacks."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(path.parent)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=path.name, dtype=_dtype(path), output_loading_info=True
    )
    model, report = loaded
    # Its weights are plain ones by now, which transformers does not say: it refuses to save them.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer, sorted(report["missing_keys"])


def _dtype(path: Path) -> torch.dtype:
    """Half precision where all matrices are in it; what was quantized fits no half precision."""
    from gguf import GGMLQuantizationType, GGUFReader

    halves = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
    kinds = {tensor.tensor_type for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1}
    return halves.get(next(iter(kinds)), torch.float32) if len(kinds) == 1 else torch.float32
