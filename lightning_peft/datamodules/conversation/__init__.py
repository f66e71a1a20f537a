"""Conversations, and MT-Bench."""

from lightning_peft.datamodules.conversation.module import ConversationDataModule

__all__ = ["ConversationDataModule"]
