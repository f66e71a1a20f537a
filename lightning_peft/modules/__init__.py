"""LightningModules around adapted models."""

from lightning_peft.modules.causal_lm import CausalLMModule

__all__ = ["CausalLMModule"]
