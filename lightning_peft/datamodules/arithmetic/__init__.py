"""Arithmetic on the embedded model: problems, and the data module over them."""

from lightning_peft.datamodules.arithmetic.module import ArithmeticDataModule

__all__ = ["ArithmeticDataModule"]
