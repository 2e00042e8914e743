"""All that this theme measures of a method, for every method that fits a real model: lab 714."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from lablib.compression.recover import language_loss
from lablib.models import anatomy
from lablib.peft.catalogue import put_
from lablib.peft.intrinsic import intrinsic_
from lablib.peft.measure import Judge, Learn, measure_method, times
from lablib.peft.peft_guide import _attending, as_if_trained, s4_
from lablib.peft.reconfigure import at_once, far_
from lablib.peft.side import side_
from lablib.peft.sparse import fisher, largest, sparse_at_


def ways(
    model: nn.Module, names: Sequence[str], rows: Tensor, reduction: int
) -> dict[str, Callable[[nn.Module], None]]:
    """Name -> what puts each of these methods into the model, then FAR, and S4 where it fits.

    names: of the catalogue, at its sizes, with exceptions. A dense change of every matrix of
    SmolLM2, or a copy of it while one is merged, is as large as SmolLM2, so FISH chooses among
    queries and values, intrinsic SAID changes values alone, and FAR one projection of each
    feed-forward layer; the ladder's width is the model's by `reduction`. rows: a batch, by whose
    gradient FISH and FAR choose what trains: of FAR, one percent of the rows that lead up.
    """
    pair = _attending(model)
    places = largest(fisher(model, [rows], language_loss, *pair), 0.01)
    amounts = at_once(model, rows, language_loss)
    amounts = {n: amounts[n] for n in anatomy.projections(model, "up")}
    puts = {name: partial(put_, name=name) for name in names}
    smaller = {
        "ladder side": lambda m: side_(m, reduction),
        "FISH": lambda m: sparse_at_(m, places),
        "intrinsic SAID": lambda m: intrinsic_(m, 4000, pair[-1:], said=True),
    }
    puts |= {name: put for name, put in smaller.items() if name in puts}
    puts["FAR"] = lambda m: far_(m, 0.01, amounts)
    return puts | ({"S4": s4_} if len(anatomy.blocks(model)) >= 4 else {})


def whole_table(
    model: nn.Module,
    puts: Mapping[str, Callable[[nn.Module], None]],
    rows: Tensor,
    learners: Sequence[str],
    learn: Learn,
    judge: Judge,
    repeats: int = 2,
) -> dict[str, dict]:
    """Rows of `measure_method` with `times`, of all these ways to put a method into the model.

    learners: those that learn, too, are judged, and have a step's rise of memory measured. The
    others merge what noise has moved by 0.02. rows: (n, length + 1), of a step.
    """

    def loss(model: nn.Module) -> Tensor:
        return language_loss(model, rows)

    def outputs(model: nn.Module) -> Tensor:
        return anatomy.logits(model, rows[:, :-1])

    taken, found = times(model, puts, loss, outputs, repeats), {}
    for name, put in puts.items():
        if name in learners:
            extra = {"learn": learn, "judge": judge, "observed": True}
            row = measure_method(model, put, loss, outputs, **extra)
        else:
            row = measure_method(model, as_if_trained(put, 0.02), loss, outputs)
        found[name] = row | taken[name]
    return found
