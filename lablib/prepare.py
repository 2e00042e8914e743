"""Set-up: fetch the corpora, prepare the pretrained models. Does nothing when all is there."""

import time

from lablib.data.corpora import CORPORA, prepare


def prepare_all() -> None:
    """Prepare each corpus and model in turn, saying what is done and how long it took.

    Each is written whole or not at all, so after an interruption the next run goes on with the
    first that is missing. Raises DataError when something can't be had.
    """
    steps = [
        (
            f"corpus {corpus.name} ({corpus.source})",
            corpus.path.is_file,
            lambda c=corpus: prepare(c.name),
        )
        for corpus in CORPORA.values()
        if not corpus.online
    ]
    steps += _models()
    missing = [step for step in steps if not step[1]()]
    for number, (what, _, work) in enumerate(missing, start=1):
        print(f"[{number}/{len(missing)}] {what} ...", end=" ", flush=True)
        start = time.perf_counter()
        work()
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
    print(f"{len(steps)} corpora and models are ready")


def _models() -> list:
    # The model code imports torch (seconds): readiness is asked of the file system alone.
    from lablib.models.weights import is_ready, local_names, prepare_model

    return [
        (f"model {name}", lambda n=name: is_ready(n), lambda n=name: prepare_model(n))
        for name in local_names()
    ]
