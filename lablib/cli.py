"""`python -m lablib`: the catalogue, studies, verification, benchmarks and set-up."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lablib.evidence import tiers
from lablib.papers import UnknownPaper, paper, themes
from lablib.paths import cache_dir, project_dir


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. Expected failures print one sentence, no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal may lack the letters of a title
            stream.reconfigure(errors="replace")
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except BrokenPipeError:  # the reader of our output, such as `head`, has enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except OSError as error:
        print(_sentence(error), file=sys.stderr)
        return 2
    except (UnknownPaper, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _sentence(error: OSError) -> str:
    """What went wrong with which file; for one in the cache, how to have the cache elsewhere."""
    if error.filename is None:
        return error.strerror or str(error)
    elsewhere = Path(str(error.filename)).is_relative_to(cache_dir())
    way_out = "; LABLIB_HOME can name another folder for the cache" if elsewhere else ""
    return f"{error.filename}: {error.strerror}{way_out}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lablib", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        return made

    listing = command("papers", _papers, "the catalogue as a table, with status")
    listing.add_argument("--theme", choices=list(themes()))
    where = command("where", _where, "every place of a paper")
    where.add_argument("slug")
    new = command("new", _new, "write the places of a paper that are missing")
    new.add_argument("slug")
    study = command("study", _study, "make the runs of a paper's study that are missing")
    study.add_argument("slug")
    study.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N")
    study.add_argument("--executor", metavar="ADDRESS", help="of a Dask scheduler to run on")
    study.add_argument("--shard", type=_shard, default=(1, 1), metavar="k/n", help="one of n parts")
    study.add_argument("--tuning", action="store_true", help="make the tuning runs alone")
    study.add_argument("--check", action="store_true", help="make nothing; 1 if something is wrong")
    verify = command("verify", _verify, "run a lab headless and write what it measured")
    verify.add_argument("slug", nargs="?", help="slug or lab number")
    verify.add_argument("--tier", choices=tiers.TIERS)
    verify.add_argument("--save", action="store_true", help="store the outputs in the notebook")
    verify.add_argument("--stale", action="store_true", help="every lab whose result is stale")
    coverage = command("coverage", _coverage, "write the tables of what was measured")
    coverage.add_argument("--check", action="store_true", help="change nothing; 1 if wrong")
    command("doctor", _doctor, "what this machine can run, and how to mend the rest")
    bench = command("bench", _bench, "time kernels, training, encoding or labs")
    bench.add_argument("what", nargs="?", choices=("kernels", "training", "encoding", "labs"))
    bench.add_argument("--tier", choices=tiers.TIERS, help="of the labs")
    setup = command("setup", _setup, "fetch the corpora and prepare the pretrained models")
    setup.add_argument("--labs", nargs="+", default=[], metavar="LAB", help="only what these need")
    frames = command("frames", _frames, "store what a lab's sliders show, for the site")
    frames.add_argument("slugs", nargs="+", metavar="SLUG", help="slugs or lab numbers")
    frames.add_argument("--tier", choices=tiers.TIERS, default="cpu")
    course = command("course", _course, "build an nbgrader course from labs")
    course.add_argument("--labs", nargs="+", default=[], metavar="LAB", help="numbers or slugs")
    course.add_argument("--themes", nargs="+", default=[], choices=list(themes()), metavar="THEME")
    course.add_argument("--to", type=Path, default=Path("build/course"), metavar="FOLDER")
    return parser


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part such as 2/8")
    return int(part), int(parts)


def _papers(options: argparse.Namespace) -> None:
    from lablib.evidence.coverage import states

    rows = [row for row in states() if options.theme in (None, row.paper.theme)]
    for row in rows:
        found = row.paper
        title = found.title if len(found.title) <= 70 else found.title[:69] + "…"
        print(f"{found.lab:>4}  {found.slug:28} {found.date[:4]}  {row.line:22} {title}")
    print(f"{len(rows)} papers")


def _where(options: argparse.Namespace) -> None:
    for what, path in paper(options.slug).paths.items():
        print(f"{what:10} {_shown(path)}{'' if path.exists() else '  (not there yet)'}")


def _shown(path: Path) -> str:
    root = project_dir()
    return str(path.relative_to(root) if root and root in path.parents else path)


def _new(options: argparse.Namespace) -> None:
    from lablib.papers.scaffold import write_missing

    written = write_missing(paper(options.slug))
    print("\n".join(f"wrote {_shown(path)}" for path in written) or "nothing was missing")


def _study(options: argparse.Namespace) -> int:
    from lablib.evidence.studies import dask_executor
    from lablib.evidence.studies import study as find

    study = find(options.slug)
    if not study.exists:
        raise FileNotFoundError(
            f"{study.paper.slug} has no study: {_shown(study.paper.paths['study'])}"
        )
    if not options.check:
        with dask_executor(options.executor) as executor:
            study.make(
                workers=options.workers,
                executor=executor,
                shard=options.shard,
                points="TUNING" if options.tuning else "POINTS",
                done=lambda row: print(f"{row['seconds']:7.1f} s  {row['point']}", flush=True),
            )
    if options.tuning:
        return 0
    if options.shard != (1, 1) and not options.check:
        k, n = options.shard
        print(f"shard {k} of {n} is done; the one that is done last writes {study.path.name}")
        return 0
    found = study.problems()
    for verdict in [] if found else study.verdicts():
        print(f"{verdict.claim:32} {verdict.verdict:30} {verdict.summary}")
    print("\n".join(found) if found else f"the study of {study.paper.slug} is whole and current")
    return int(bool(found))


def _verify(options: argparse.Namespace) -> int:
    from lablib.evidence.coverage import states
    from lablib.evidence.verify import budget_line, verify, verify_each

    tier = options.tier or tiers.current()
    if options.stale:
        rows = [row for row in states() if row.present and (row.result is None or row.stale)]
        failed = verify_each([row.paper for row in rows], tier)
        print(f"{len(rows)} labs were stale, {len(failed)} failed: {', '.join(failed) or 'none'}")
        return int(bool(failed))
    if not options.slug:
        raise ValueError("say which lab, or --stale for every lab whose result is stale")
    result = verify(paper(options.slug), tier, save=options.save)
    for claim in result["claims"]:
        print(f"{claim['claim']:32} {claim['verdict']:30} {claim['summary']}")
    print(budget_line(result["slug"], tier, result["seconds"], result["peak_gb"]))
    return 0


def _coverage(options: argparse.Namespace) -> int:
    from lablib.evidence.coverage import problems, update

    if not options.check:
        changed = update()
        print("\n".join(f"{_shown(path)} updated" for path in changed) or "tables were up to date")
    found = problems()
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
    from lablib.bench import BENCHMARKS

    for what in [options.what] if options.what else BENCHMARKS:
        print(f"== {what}")
        BENCHMARKS[what](options.tier)


def _setup(options: argparse.Namespace) -> None:
    from lablib.prepare import prepare_all

    prepare_all(options.labs)


def _frames(options: argparse.Namespace) -> None:
    from lablib.site.frames import record

    for slug in options.slugs:
        print(record(paper(slug), options.tier), flush=True)


def _course(options: argparse.Namespace) -> None:
    from lablib.course.build import build, chosen

    made = build(chosen(options.labs, options.themes), options.to)
    print("\n".join(f"released {options.to / 'release' / name}" for name in made))
