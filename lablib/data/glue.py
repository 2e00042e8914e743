"""GLUE's tasks (Wang et al., 2018) through `datasets`, for the gpu tier.

The labs' own tasks lie in packages, see `lablib.data.tasks`; nothing is judged on these.
"""

from __future__ import annotations

from lablib.data.hub import hub_rows
from lablib.data.packages import DataError
from lablib.data.tasks import Example, Splits

COLUMNS = {  # of each task, its text, and its pair where there is one
    "cola": ("sentence", ""),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence", ""),
    "stsb": ("sentence1", "sentence2"),
}


def load_glue(
    name: str, train: int = 2000, test: int = 1000, source: str = "nyu-mll/glue"
) -> Splits:
    """The first examples of a GLUE task; stsb's labels run from 0 to 5, others are classes.

    GLUE keeps its test labels to itself: "test" is from its validation split (of MNLI, the one of
    the same genres), "validation" are `test` more of its training examples.
    source: where `datasets` finds it.
    Raises DataError: unknown name, no `datasets`, or the hub can't be reached.
    """
    if name not in COLUMNS:
        raise DataError(f"GLUE has no task {name!r}; it has {', '.join(COLUMNS)}.")
    last = "validation_matched" if name == "mnli" else "validation"
    learn = _examples(source, name, "train", train + test)
    judge = _examples(source, name, last, test)
    return Splits(learn[:train], learn[train:], judge)


def _examples(source: str, name: str, split: str, n: int) -> list[Example]:
    text, pair = COLUMNS[name]
    rows = hub_rows("GLUE", source, name, split, n)
    return [Example(row[text], row["label"], row[pair] if pair else "") for row in rows]
