"""Eight tasks of GLUE: texts and pairs of texts with labels."""

from lightning_peft.datamodules.glue.module import GlueDataModule

__all__ = ["GlueDataModule"]
