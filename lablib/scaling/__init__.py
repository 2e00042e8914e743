"""Scaling laws: how loss falls with parameters, data and compute."""
