"""Files of llama.cpp's, converted once into a cache."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_peft.assets import gguf, resolve_model
from lightning_peft.errors import MissingFile, UserError

writer = pytest.importorskip("gguf")

WORDS = ["hello", "world", "Ġthe", "Ġa"]
HEADS, KEY_HEADS, WIDTH, INNER, LAYERS = 4, 2, 32, 48, 2


def alphabet() -> list[str]:
    """The 256 characters in which a byte-level tokenizer writes bytes."""
    return sorted(ByteLevel.alphabet())


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
    )
    return LlamaForCausalLM(config).eval()


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a query or key as llama.cpp orders them for its rotary embedding."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def names() -> dict[str, str]:
    """llama.cpp's name of each of transformers' tensors."""
    found = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(LAYERS):
        for ours, theirs in parts.items():
            found[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    return found


def write_gguf(path: Path, model: LlamaForCausalLM, dtype: Any = None, **changes: Any) -> Path:
    """A file as llama.cpp's own converter would write it."""
    out = writer.GGUFWriter(path, changes.get("architecture", "llama"))
    out.add_name("tiny")
    out.add_context_length(128)
    out.add_embedding_length(WIDTH)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(INNER)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KEY_HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    out.add_rope_dimension_count(WIDTH // HEADS)
    out.add_vocab_size(260)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    tokens = [*alphabet(), "<s>", "</s>", "he", "ll"]
    out.add_token_list(tokens)
    out.add_token_types([1] * 256 + [3, 3, 1, 1])
    out.add_token_merges(["h e", "l l"])
    out.add_bos_token_id(256)
    out.add_eos_token_id(257)
    for ours, theirs in names().items():
        if theirs == changes.get("without"):
            continue
        weight = model.state_dict()[ours]
        if "attn_q" in theirs or "attn_k" in theirs:
            weight = interleaved(weight, HEADS if "attn_q" in theirs else KEY_HEADS)
        half = dtype is not None and weight.dim() > 1
        out.add_tensor(theirs, (weight.to(dtype) if half else weight.float()).numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(gguf.CACHE, str(tmp_path / "cache"))
    gguf._converted.cache_clear()
    return tmp_path / "cache"


def test_a_file_is_the_model_that_was_written(cache: Path, tmp_path: Path) -> None:
    model = tiny()
    folder = Path(resolve_model(str(write_gguf(tmp_path / "tiny.gguf", model))))
    assert folder.parent == cache
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(0, 260, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert (loaded.dtype, loaded.config.tie_word_embeddings) == (torch.float32, True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("hello, wörld")["input_ids"], skip_special_tokens=True) == (
        "hello, wörld"
    )
    loaded.save_pretrained(tmp_path / "again")  # no trace of a quantizer
    assert [path.name for path in cache.iterdir()] == [folder.name]  # neither parts nor locks


def test_half_precision_stays_what_it_is(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "half.gguf", tiny(), torch.float16)
    assert AutoModelForCausalLM.from_pretrained(resolve_model(str(path))).dtype == torch.float16


def test_a_file_is_converted_once_and_another_content_is_another_model(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny())
    first = resolve_model(str(path))
    gguf._converted.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(gguf, "_convert", None)  # nothing is converted again
        shutil.copy(path, tmp_path / "copy.gguf")
        assert resolve_model(str(path)) == first
    other = tiny()
    torch.nn.init.zeros_(other.model.norm.weight)
    write_gguf(path, other)
    assert resolve_model(str(path)) != first


@pytest.mark.parametrize("damage", ["flip", "cut", "record", "lost"])
def test_a_damaged_cache_is_named_and_made_anew(damage: str, cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny())
    folder = Path(resolve_model(str(path)))
    weights = (folder / "model.safetensors").read_bytes()
    if damage == "flip":
        flipped = bytearray(weights)
        flipped[-5] ^= 4
        (folder / "model.safetensors").write_bytes(flipped)
    elif damage == "cut":
        (folder / "config.json").write_text("{")
    elif damage == "record":
        (folder / gguf.RECORD).write_text("[]")
    else:
        (folder / "model.safetensors").unlink()
    gguf._converted.cache_clear()
    with pytest.warns(UserWarning, match=r"is damaged \(.*\) and is made anew"):
        assert Path(resolve_model(str(path))) == folder
    assert (folder / "model.safetensors").read_bytes() == weights


def test_what_a_killed_conversion_left_is_not_loaded_and_goes(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny())
    folder = Path(resolve_model(str(path)))
    folder.rename(cache / f".{folder.name}.123.part")
    gguf._converted.cache_clear()
    assert Path(resolve_model(str(path))) == folder
    assert [found.name for found in cache.iterdir()] == [folder.name]


def _resolve(path: str, barrier: Any, found: Any) -> None:
    barrier.wait()
    found.put(resolve_model(path))


def test_two_processes_at_once_have_one_model(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny())
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(2), context.Queue()
    both = [context.Process(target=_resolve, args=(str(path), barrier, found)) for _ in range(2)]
    for process in both:
        process.start()
    folders = {found.get(timeout=120) for _ in both}
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(folders) == 1
    assert [path.name for path in cache.iterdir()] == [Path(folders.pop()).name]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"architecture": "rwkv6"}, "architecture rwkv6 is not supported yet"),
        ({"without": "blk.1.ffn_up.weight"}, r"lacks weights: model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_file_that_is_no_model_is_refused(
    changes: dict[str, str], what: str, cache: Path, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "odd.gguf", tiny(), **changes)
    with pytest.raises(UserError, match=f"model.model_name_or_path: .*odd.gguf .*{what}"):
        resolve_model(str(path))
    assert not list(cache.iterdir())


def test_a_damaged_file_is_refused(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny())
    whole = path.read_bytes()
    for content, what in (
        (b"PK\x03\x04", "does not begin with GGUF"),
        (b"", "does not begin with GGUF"),
        (whole[:40], "cannot be converted"),
        (whole[: len(whole) // 2], "cannot be converted"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=what) as caught:
            resolve_model(str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(MissingFile, match=r"no.gguf does not exist"):
        resolve_model(str(tmp_path / "no.gguf"))


def test_without_the_package_its_command_is_said(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny())
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package gguf; pip install gguf"):
        resolve_model(str(path))


def test_a_cache_that_cannot_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(gguf.CACHE, str(tmp_path / "file" / "cache"))
    gguf._converted.cache_clear()
    with pytest.raises(UserError, match=f"Not a directory; .* variable {gguf.CACHE}"):
        resolve_model(str(path))


def test_the_cache_is_that_of_the_user_or_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(gguf.CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert gguf.cache_folder() == Path("/some/cache/lightning_peft")
    monkeypatch.setenv(gguf.CACHE, "/other")
    assert gguf.cache_folder() == Path("/other")


def test_a_command_takes_a_file(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny())
    words = [
        "estimate",
        *("--config", "configs/quickstart.yaml"),
        *("--model.model_name_or_path", str(path)),
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_peft", *words], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((next(cache.iterdir()) / gguf.RECORD).read_text())["source"] == "tiny.gguf"
