"""Metrics of texts and of labels."""
