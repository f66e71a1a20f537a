"""Code: HumanEval and MBPP, run in a sandbox."""

from lightning_peft.datamodules.code.module import CodeDataModule

__all__ = ["CodeDataModule"]
