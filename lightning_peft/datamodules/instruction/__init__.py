"""One's own records."""

from lightning_peft.datamodules.instruction.module import InstructionDataModule

__all__ = ["InstructionDataModule"]
