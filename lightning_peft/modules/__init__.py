"""LightningModules around adapted models."""

from lightning_peft.modules.causal_lm import CausalLMModule
from lightning_peft.modules.classification import SequenceClassificationModule

__all__ = ["CausalLMModule", "SequenceClassificationModule"]
