"""Scores of predictions: `texts` compares with references, `labels` counts over processes."""
