"""Part 1: language models, from counts to transformers."""
