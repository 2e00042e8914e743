"""`python -m lablib bench`: each benchmark prints its own table."""

from lablib.papers import papers
from lablib.paths import project_dir


def time_kernels(tier: str | None = None) -> None:
    """Time every op of lablib.kernels against naive, torch.compile and the best peer."""
    from lablib.bench.kernels import bench_kernels

    bench_kernels()


def time_training(tier: str | None = None) -> None:
    """Time `fit` against a bare PyTorch loop and against transformers' own model."""
    from lablib.bench.training import bench_lora, bench_training

    bench_training()
    bench_lora()


def time_encoding(tier: str | None = None) -> None:
    """Time vectors of texts against sentence-transformers.

    The ratio of each round goes to data/measured/encoding.json.
    """
    from lablib.bench.encoding import store

    store()


def time_labs(tier: str | None = None) -> None:
    """Run every lab at a tier (smoke unless told) and hold it against the tier's budget.

    What all labs take at smoke, which is what grading runs, goes to data/measured/grading.json.
    """
    from lablib.evidence.coverage import GRADING
    from lablib.evidence.verify import budget_line, run
    from lablib.files import write_json

    tier = tier or "smoke"
    root, measured = project_dir(), {}
    paths = [found.paths["lab"] for found in papers() if found.present]
    for path in [root / "labs" / "00-start-here.ipynb", *paths]:
        _, seen = run(path, tier)
        print(budget_line(path.stem, tier, seen["seconds"], seen["peak_gb"]), flush=True)
        peak = seen["peak_gb"] and round(seen["peak_gb"], 2)
        measured[path.stem] = {"seconds": round(seen["seconds"], 1), "peak_gb": peak}
    if tier == "smoke":
        write_json(GRADING, measured)


BENCHMARKS = {
    "kernels": time_kernels,
    "training": time_training,
    "encoding": time_encoding,
    "labs": time_labs,
}
