"""Smaller models: weights in few bits, parts that go, and what is measured to choose them."""
