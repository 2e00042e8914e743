"""Part 2: what a language model is."""
