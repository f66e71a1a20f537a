"""The study's base model: the embedded model's recipe on a smaller LLaMA.

    python benchmarks/study_base.py --output runs/study/base

Hidden 64, four layers, pre-trained on the addition of three-digit numbers alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import pretrain_tiny_llama as recipe


def build() -> LlamaForCausalLM:
    """The untrained model."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(recipe.build_tokenizer()),
            hidden_size=64,
            num_hidden_layers=4,
            intermediate_size=192,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def main() -> None:
    """Pre-train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/study/base"))
    parser.add_argument("--steps", type=int, default=1250)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    test, held_out = recipe.hold_out(rng)
    model, began = build(), time.time()
    optimizer = recipe.make_optimizer(model, options.lr)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step, options.steps, options.lr)
        tokens = recipe.encode_additions(recipe.draw_pairs(rng, options.batch_size, held_out))
        scored = torch.zeros_like(tokens, dtype=torch.bool)
        scored[:, 8:] = True
        loss = recipe.scored_loss(model, tokens, scored)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0:
            model.eval()
            right = recipe.addition_accuracy(model, test)
            model.train()
            seconds = time.time() - began
            print(
                f"step {step + 1} loss {loss.item():.4f} held-out {right:.4f} {seconds:.0f} s",
                flush=True,
            )
            model.save_pretrained(options.output)
            recipe.build_tokenizer().save_pretrained(options.output)


if __name__ == "__main__":
    main()
