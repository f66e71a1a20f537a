"""One's own records, in the forms in which people keep instructions."""

from lightning_peft.datamodules.instruction.module import InstructionDataModule

__all__ = ["InstructionDataModule"]
