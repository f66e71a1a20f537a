"""Tasks: one file for each benchmark, over one base."""

from lightning_peft.datamodules.arithmetic import ArithmeticDataModule
from lightning_peft.datamodules.base import TextDataModule
from lightning_peft.datamodules.commonsense import CommonsenseDataModule
from lightning_peft.datamodules.examples import Example
from lightning_peft.datamodules.protocols import Protocol

__all__ = [
    "ArithmeticDataModule",
    "CommonsenseDataModule",
    "Example",
    "Protocol",
    "TextDataModule",
]
