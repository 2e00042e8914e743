"""Conditional computation: skipping, mixtures of experts, and what several papers share."""
