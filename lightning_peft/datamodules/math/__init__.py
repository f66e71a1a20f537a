"""Mathematics: training on MetaMathQA or GSM8K, tests on GSM8K, MATH, SVAMP and AQuA."""

from lightning_peft.datamodules.math.module import MathDataModule

__all__ = ["MathDataModule"]
