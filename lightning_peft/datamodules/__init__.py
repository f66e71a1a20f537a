"""Tasks: one file or folder for each benchmark, over three bases.

What an author of a task reads: `base` (answered in text; its docstring holds a whole task),
`labelled` (recognised as a class or given a score), `references` (compared with several texts) and
`protocols` (how a task is asked). A small task is one file; a large one is a folder with
``module.py``, ``records.py`` and what only that task needs. `loading` makes records into batches,
`metrics` computes scores.
"""

from lightning_peft.datamodules.arithmetic.module import ArithmeticDataModule
from lightning_peft.datamodules.base import TextDataModule
from lightning_peft.datamodules.code.module import CodeDataModule
from lightning_peft.datamodules.commonsense import CommonsenseDataModule
from lightning_peft.datamodules.conversation.module import ConversationDataModule
from lightning_peft.datamodules.dart import DartDataModule
from lightning_peft.datamodules.dialogsum import DialogSumDataModule
from lightning_peft.datamodules.e2e import E2EDataModule
from lightning_peft.datamodules.glue.module import GlueDataModule
from lightning_peft.datamodules.instruction.module import InstructionDataModule
from lightning_peft.datamodules.labelled import LabelledDataModule
from lightning_peft.datamodules.loading.examples import Example
from lightning_peft.datamodules.loading.labelled import Labelled
from lightning_peft.datamodules.loading.records import Source
from lightning_peft.datamodules.math.module import MathDataModule
from lightning_peft.datamodules.protocols import Protocol

__all__ = [
    "ArithmeticDataModule",
    "CodeDataModule",
    "CommonsenseDataModule",
    "ConversationDataModule",
    "DartDataModule",
    "DialogSumDataModule",
    "E2EDataModule",
    "Example",
    "GlueDataModule",
    "InstructionDataModule",
    "Labelled",
    "LabelledDataModule",
    "MathDataModule",
    "Protocol",
    "Source",
    "TextDataModule",
]
