"""Code: training on instructions, tests on HumanEval and MBPP, whose answers run in a sandbox."""

from lightning_peft.datamodules.code.module import CodeDataModule

__all__ = ["CodeDataModule"]
