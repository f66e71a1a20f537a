"""GLUE."""

from lightning_peft.datamodules.glue.module import GlueDataModule

__all__ = ["GlueDataModule"]
