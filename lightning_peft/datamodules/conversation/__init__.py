"""Conversations to train on, and MT-Bench to test."""

from lightning_peft.datamodules.conversation.module import ConversationDataModule

__all__ = ["ConversationDataModule"]
