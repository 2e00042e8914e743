"""`python -m lablib`: the catalogue, verification, the doctor, benchmarks and set-up."""

import argparse
import os
import sys
from collections.abc import Sequence

from lablib.papers import UnknownPaper, paper, papers
from lablib.paths import project_dir


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. Expected failures print one sentence, no traceback."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (UnknownPaper, FileNotFoundError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, such as `head`, has enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lablib", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        return made

    listing = command("papers", _papers, "the catalogue as a table, with status")
    listing.add_argument("--theme", choices=sorted({found.theme for found in papers()}))
    where = command("where", _where, "the six paths of a paper")
    where.add_argument("slug")
    verify = command("verify", _verify, "run a lab headless and write what it measured")
    verify.add_argument("slug", help="slug or lab number")
    verify.add_argument("--tier", choices=("smoke", "cpu", "gpu"))
    verify.add_argument("--save", action="store_true", help="store the outputs in the notebook")
    coverage = command("coverage", _coverage, "write the README's table from data/results")
    coverage.add_argument("--check", action="store_true", help="change nothing; 1 if stale")
    command("doctor", _doctor, "what this machine can run, and how to mend the rest")
    bench = command("bench", _bench, "time kernels, labs or training")
    bench.add_argument("what", nargs="?", choices=("kernels", "labs", "training"))
    bench.add_argument("--tier", choices=("smoke", "cpu", "gpu"), help="of the labs")
    command("setup", _setup, "fetch the corpora and prepare the pretrained models")
    return parser


def _papers(options: argparse.Namespace) -> None:
    from lablib.lab.coverage import status

    rows = [found for found in papers() if options.theme in (None, found.theme)]
    for found in rows:
        title = found.title if len(found.title) <= 70 else found.title[:69] + "…"
        state = status(found)
        print(f"{found.lab:>4}  {found.slug:28} {found.date[:4]}  {state:22} {title}")
    print(f"{len(rows)} papers")


def _where(options: argparse.Namespace) -> None:
    root = project_dir()
    for what, path in paper(options.slug).paths.items():
        shown = path.relative_to(root) if root and root in path.parents else path
        print(f"{what:10} {shown}{'' if path.exists() else '  (not there yet)'}")


def _verify(options: argparse.Namespace) -> None:
    from lablib.lab import tiers
    from lablib.lab.verify import budget_line, verify

    tier = options.tier or tiers.current()
    result = verify(paper(options.slug), tier, save=options.save)
    for claim in result["claims"]:
        print(f"{claim['claim']:32} {claim['verdict']:30} {claim['summary']}")
    print(budget_line(result["slug"], tier, result["seconds"], result["peak_gb"]))


def _coverage(options: argparse.Namespace) -> int:
    from lablib.lab.coverage import problems, update_readme

    root = project_dir()
    if root is None:
        raise FileNotFoundError("coverage needs a checkout: the README is not in the wheel")
    readme = root / "README.md"
    if not options.check:
        print("README.md updated" if update_readme(readme) else "README.md was up to date")
    found = problems(readme)
    print("\n".join(found) if found else "every result is current")
    return 1 if options.check and found else 0


def _doctor(options: argparse.Namespace) -> int:
    from lablib.doctor import examine

    states = []
    for finding in examine():
        print(finding, flush=True)
        states.append(finding.state)
    return int("fix" in states)


def _bench(options: argparse.Namespace) -> None:
    from lablib import benchmarks

    for what in [options.what] if options.what else ["kernels", "training", "labs"]:
        print(f"== {what}")
        benchmarks.BENCHMARKS[what](options.tier)


def _setup(options: argparse.Namespace) -> None:
    from lablib.prepare import prepare_all

    prepare_all()
