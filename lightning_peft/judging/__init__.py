"""A language model behind an endpoint that rates answers to MT-Bench."""
