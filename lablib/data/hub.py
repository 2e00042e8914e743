"""Rows of data sets on the Hugging Face hub, for the gpu tier: nothing is judged on them."""

from __future__ import annotations

from itertools import islice
from typing import Any

from lablib.data.packages import DataError


def hub_rows(
    name: str, repository: str, config: str | None, split: str, count: int
) -> list[dict[str, Any]]:
    """The first rows of a split, so many where there are; streamed, so that no more is fetched.

    name: what messages call it. repository, config, split: as `datasets` names them.
    Raises DataError without package datasets, or where the hub can't be reached.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"{name} is on the Hugging Face hub: `pip install datasets` first."
        ) from None
    from httpx import HTTPError

    try:
        return list(islice(load_dataset(repository, config, split=split, streaming=True), count))
    except (OSError, HTTPError) as error:
        why = type(error).__name__
        raise DataError(f"{name} can't be reached on the Hugging Face hub ({why}).") from error
