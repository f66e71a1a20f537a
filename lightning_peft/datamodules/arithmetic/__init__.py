"""Generated arithmetic for the embedded model."""

from lightning_peft.datamodules.arithmetic.module import ArithmeticDataModule

__all__ = ["ArithmeticDataModule"]
