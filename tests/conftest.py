"""What several tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_peft import testing
from lightning_peft.adapters import LoRALinear, adapter_layers
from lightning_peft.assets import TINY_LLAMA, resolve_model
from lightning_peft.datamodules import Example
from lightning_peft.datamodules.loading.batches import PromptDataset
from lightning_peft.datamodules.loading.examples import Encoder
from lightning_peft.strategies import AdapterStrategy

PEFT = "base_model.model."

# The tests' models are so small that a second thread costs more than it computes.
torch.set_num_threads(1)


@pytest.fixture
def tiny_llama() -> Callable[..., Any]:
    """Makes a random LLaMA with grouped-query attention: ``tiny_llama(seed, hidden_size=…)``."""
    return testing.tiny_llama


@pytest.fixture
def random_batch() -> Callable[..., dict[str, torch.Tensor]]:
    """Makes a right-padded batch for it: ``random_batch(seed, rows, length)``."""
    return testing.random_batch


@pytest.fixture
def logits() -> Callable[..., torch.Tensor]:
    """Logits of a model in eval at the attended positions of a batch, (tokens, vocabulary)."""

    def compute(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        was_training = model.training
        model.eval()
        with torch.no_grad():
            out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        model.train(was_training)
        return out[batch["attention_mask"].bool()]

    return compute


@pytest.fixture
def pair(tiny_llama) -> Callable[..., tuple[Any, Any]]:
    """Makes our model and PEFT's over one base, B random and A of ours copied into PEFT's.

    ``copied`` says what else of a layer is PEFT's, by the name of PEFT's dictionary of parameters.
    """
    peft = pytest.importorskip("peft")

    def make(
        strategy: AdapterStrategy,
        config: Any,
        copied: Mapping[str, Callable[[LoRALinear], torch.Tensor]] | None = None,
        base: Callable[[], Any] = tiny_llama,
    ) -> tuple[Any, Any]:
        ours, theirs = base(), peft.get_peft_model(base(), config)
        torch.manual_seed(0)
        strategy.attach(ours)
        parts = {"lora_A": lambda m: m.lora_A, "lora_B": lambda m: m.lora_B, **(copied or {})}
        for name, layer in adapter_layers(ours).items():
            torch.nn.init.normal_(layer.lora_B, std=0.2)
            other = theirs.get_submodule(PEFT + name)
            for part, value in parts.items():
                held = getattr(other, part)["default"]
                held = getattr(held, "weight", held)
                with torch.no_grad():
                    held.copy_(value(layer).view_as(held))
        return ours, theirs

    return make


@pytest.fixture
def gradients() -> Callable[..., torch.Tensor]:
    """Loss of a model on a batch, backward included; the random stream begins at ``seed``."""

    def compute(model: Any, batch: dict[str, torch.Tensor], seed: int = 7) -> torch.Tensor:
        model.zero_grad()
        torch.manual_seed(seed)
        loss = model(**batch).loss
        loss.backward()
        return loss.detach()

    return compute


@pytest.fixture
def run_layer() -> Callable[..., list[torch.Tensor]]:
    """Output, gradient of the input and of every parameter, from one draw of all masks.

    ``run_layer(layer, forward, x)``, forward being the layer or its formula.
    """

    def run(layer: Any, forward: Callable[..., torch.Tensor], x: torch.Tensor) -> Any:
        x = x.detach().clone().requires_grad_()
        layer.zero_grad()
        torch.manual_seed(3)
        y = forward(x)
        (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        trained = [p.grad.clone() for p in layer.parameters() if p.requires_grad]
        return [y.detach(), x.grad, *trained]

    return run


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """Compares what two calls of ``run_layer`` gave: ``assert_same(ours, theirs, tolerance)``."""

    def same(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float) -> None:
        assert len(ours) == len(theirs) > 3
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            assert b.abs().max() > 0
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))

    return same


@pytest.fixture
def model() -> Any:
    """The embedded model in eval, float32."""
    return AutoModelForCausalLM.from_pretrained(resolve_model("tiny_llama")).eval()


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return Encoder(AutoTokenizer.from_pretrained(resolve_model("tiny_llama")), max_length=600)


@pytest.fixture(scope="session")
def ask(encoder: Encoder) -> Callable[[Sequence[str]], dict[str, Any]]:
    """Makes the batch of prompts that a test loader would."""

    def collate(prompts: Sequence[str]) -> dict[str, Any]:
        examples = [Example(prompt, "", "t", i) for i, prompt in enumerate(prompts)]
        tokens = encoder.encode(examples, with_response=False)["tokens"]
        data = PromptDataset(tokens, examples, encoder.pad_id)
        return data.collate([data[i] for i in range(len(data))])

    return collate


@pytest.fixture(scope="session")
def resolver() -> Iterator[Any]:
    """Resolves configurations; its parser is made once for all tests."""
    from lightning_peft.settings.resolve import Resolver

    before = sys.argv
    sys.argv = ["lightning-peft"]
    yield Resolver()
    sys.argv = before


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random LLaMA, smaller than the embedded one, and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_LLAMA).save_pretrained(folder)
    return folder
