"""Mathematics: GSM8K and MATH."""

from lightning_peft.datamodules.math.module import MathDataModule

__all__ = ["MathDataModule"]
