"""The base model: loading, quantizing, losses, generation."""
