"""The command `fwp`: plan, train, export and report the paper's experiments.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fwp_lightning import processor
from fwp_lightning.errors import UserError
from fwp_lightning.experiment import CHECKPOINT_SECONDS, LARGEST_SEED, PROFILES
from fwp_lightning.registry import did_you_mean
from fwp_lightning.slurm import Resources, read_resources, resource_options
from fwp_lightning.translation import commands as fairseq_tools

if TYPE_CHECKING:
    from fwp_lightning.experiment import Run

Command = Callable[[argparse.Namespace], int]

# who trains the runs of a sweep
EXECUTORS = ("local", "slurm")
# these take LightningCLI's own arguments
LIGHTNING_COMMANDS = {
    "fit": "train one configuration",
    "validate": "evaluate one configuration on the validation data",
    "test": "evaluate one configuration on the test data",
}
# these have parsers of their own, which get all that is typed behind the name
OTHER_COMMANDS = {"report": "make tables and figures from results/*.csv"}
# fairseq's own tools with the architectures of this package
FAIRSEQ_COMMANDS = {f"fairseq-{tool}": text for tool, text in fairseq_tools.TOOLS.items()}
EXAMPLES = """examples:
  fwp list                                  what can be chosen, and what can run here
  fwp sweep figure2 --dry-run               the runs of an experiment, and what they will cost
  fwp sweep figure2 figure5 --jobs 2        train what is not complete yet; run it again to go on
  fwp build-kernels --isa all               compile for any x86-64 machine now, not on first use
  fwp report figure2                        draw the figure from results/*.csv
  fwp fit --config experiments/base/retrieval.yaml --model.attention.rule delta
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code. A user's mistake is one line and exit code 2."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(typed)
    except UserError as error:
        return _complain(error)
    except KeyboardInterrupt:
        print("fwp: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of our output is gone, as in `fwp list | head`; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if sentence := _of_store(error):
            return _complain(sentence)
        raise


def _complain(problem: object) -> int:
    print(f"fwp: error: {problem}", file=sys.stderr)
    return 2


def _of_store(error: Exception) -> str | None:
    """Return what is wrong with the MLflow store if the error comes from there."""
    from fwp_lightning.experiment import find_project
    from fwp_lightning.tracking import is_of_store, store_sentence

    return store_sentence(find_project(required=False), error) if is_of_store(error) else None


def _dispatch(typed: list[str]) -> int:
    imports, rest = _take_imports(typed)
    if rest and rest[0] in LIGHTNING_COMMANDS:
        return _run_lightning(rest, imports, typed)
    if rest and rest[0] in OTHER_COMMANDS:
        _import_user_files(imports)
        return _report(rest[1:])
    if rest and rest[0] in FAIRSEQ_COMMANDS:
        return _run_fairseq(rest[0].removeprefix("fairseq-"), rest[1:], imports)
    options = build_parser().parse_args(rest)
    options.imports, options.typed = imports, typed
    command: Command = options.command
    return command(options)


def _take_imports(typed: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the values of --import, which every command takes anywhere, and the other arguments."""
    imports: list[str] = []
    rest: list[str] = []
    arguments = iter(typed)
    for argument in arguments:
        if argument == "--import":
            name = next(arguments, None)
            if name is None:
                raise UserError("--import needs a file or a module.")
            imports.append(name)
        elif argument.startswith("--import="):
            imports.append(argument.removeprefix("--import="))
        else:
            rest.append(argument)
    # workers start elsewhere
    return [str(Path(name).resolve()) if Path(name).suffix == ".py" else name for name in imports], rest


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are a sentence, not a usage text; options are written out."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "allow_abbrev": False})

    def error(self, message: str) -> Any:
        """Complain in one sentence."""
        raise UserError(f"{message}; see: {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the commands; those with a parser of their own are only named."""
    parser = _Parser(
        prog="fwp",
        description=(__doc__ or "").splitlines()[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, text in LIGHTNING_COMMANDS.items():
        commands.add_parser(name, help=f"{text} (LightningCLI arguments)", add_help=False)
    for name, text in OTHER_COMMANDS.items():
        commands.add_parser(name, help=f"{text} (fwp {name} --help)", add_help=False)
    for name, text in FAIRSEQ_COMMANDS.items():
        commands.add_parser(name, help=f"{text} (fairseq's own flags)", add_help=False)
    _add_sweep(commands)
    _add_generate(commands)
    status = _add(commands, "status", _status, "show how far every experiment is")
    status.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="default: those with a tracked run")
    _add_data_folder(status)
    _add(commands, "export", _export, "write the tracked runs to results/runs.csv and results/metrics.csv")
    again = _add(commands, "rerun", _rerun, "repeat one run from what is tracked of it: then | now")
    again.add_argument("run_key", metavar="RUN_KEY", help="as in results/runs.csv; nothing tracked is touched")
    _add_data_folder(again)
    checking = _add(
        commands, "verify", _verify, "check results/*.csv and the reports against experiments and each other"
    )
    _add_data_folder(checking)
    _add_build_kernels(commands)
    fetching = _add(commands, "download", _download, "fetch a corpus, check it, and make its token files")
    fetching.add_argument("corpus", metavar="CORPUS", help="wikitext-2 (7 MB), wikitext-103 (313 MB) or wmt14 (818 MB)")
    _add_bench(commands)
    listing = _add(commands, "list", _list, "list experiments, rules, feature maps and backends")
    listing.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_build_kernels(commands: Any) -> None:
    building = _add(commands, "build-kernels", _build_kernels, "build the compiled kernels ahead, into the cache")
    building.add_argument(
        "--isa",
        choices=["all", *processor.LEVELS],
        help="instruction set: AVX-512 (v4), AVX2 (v3) or any x86-64 (default: this processor's, or FWP_ISA)",
    )
    building.add_argument("--cuda", action="store_true", help="the CUDA kernels too; needs nvcc, and no GPU")


def _add_generate(commands: Any) -> None:
    generate = _add(commands, "generate", _generate, "continue a text with a trained language model")
    generate.add_argument("--checkpoint", required=True, metavar="FILE", help="final.ckpt of a complete run")
    generate.add_argument("--prompt", default="", metavar="TEXT", help="words to begin with, apart by spaces")
    generate.add_argument("--words", type=_positive, default=100, metavar="N", help="words to write (100)")
    generate.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="0: always the likeliest word (1)"
    )
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="among the K likeliest words; 0: among all")
    generate.add_argument("--seed", type=int, default=1, metavar="S", help="of the draws (1)")


def _add_bench(commands: Any) -> None:
    bench = _add(commands, "bench", _bench, "measure the memories and what is trained with them on this machine")
    bench.add_argument(
        "--parts", type=_words, metavar="A,B", help="of rules,fused,growth,retrieval,training,generation (all)"
    )
    bench.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    bench.add_argument("--shapes", type=_words, metavar="A,B", help="of S1,S2,S3,S4,P1,P2,M; on a CPU all but M")
    bench.add_argument("--sizes", type=_sizes, metavar="S,S", help="S of the retrieval task (20,100,600)")
    bench.add_argument("--rounds", type=_positive, default=5, metavar="N", help="measurements of each (5)")
    bench.add_argument("--peers", action="store_true", help="fetch and build peers that are not here yet")
    bench.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; nothing is saved")
    bench.add_argument("--no-save", action="store_true", help="print only, leave results/benchmarks/ as it is")


def _add(commands: Any, name: str, command: Command, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog="--import FILE, a Python file or module that registers rules or maps of yours, may be given repeatedly.",
    )
    parser.set_defaults(command=command)
    return parser


def _add_sweep(commands: Any) -> None:
    parser = _add(commands, "sweep", _sweep, "train the runs of experiments that are not complete yet")
    parser.add_argument("experiments", nargs="+", metavar="EXPERIMENT", help="as in experiments/EXPERIMENT.yaml")
    parser.add_argument(
        "--profile", default=PROFILES[0], help=f"{', '.join(PROFILES)}: how much is run (default: %(default)s)"
    )
    parser.add_argument("--protocol", help="released or corrected (default: the experiment's own)")
    parser.add_argument(
        "--jobs", type=_positive, metavar="N", help="runs at once (default: one per core, or what the cluster allows)"
    )
    parser.add_argument("--rows", type=_words, metavar="A,B", help="only these rows")
    parser.add_argument("--points", type=_words, metavar="N=1,N=2", help="only these grid values, as in n_keys=100")
    parser.add_argument("--seeds", type=_numbers, metavar="1,2", help="these seeds instead of the experiment's")
    _add_data_folder(parser)
    parser.add_argument("--dry-run", action="store_true", help="show the runs and what they will cost, train nothing")
    parser.add_argument(
        "--measure", action="store_true", help="with --dry-run: time an update of every row here, without its data"
    )
    parser.add_argument(
        "--checkpoint-seconds",
        type=_seconds,
        default=CHECKPOINT_SECONDS,
        metavar="S",
        help="between two checkpoints of a run (default: %(default)g)",
    )
    parser.add_argument(
        "--executor", choices=EXECUTORS, default=EXECUTORS[0], help="processes here, or jobs of a SLURM cluster"
    )
    cluster = parser.add_argument_group(
        "--executor slurm", "what each job asks for; one run is one task of a job array"
    )
    for name, example, text in resource_options():
        cluster.add_argument(f"--slurm-{name}", metavar=example, help=text)
    cluster.add_argument(
        "--slurm-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other option of sbatch; repeatable",
    )


def _add_data_folder(parser: argparse.ArgumentParser) -> None:
    text = "folder with train/valid/test.txt, plain or gzipped (default: what was downloaded)"
    parser.add_argument("--data", metavar="DIR", help=text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0")
    return seconds


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return words


def _sizes(text: str) -> list[int]:
    return [_positive(word) for word in _words(text)]


def _numbers(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch("[0-9]+", word) for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 1,2,3")
    numbers = list(dict.fromkeys(int(word) for word in words))
    if max(numbers) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{max(numbers)} is no seed; seeds go from 0 to {LARGEST_SEED}")
    return numbers


def _version() -> str:
    from importlib import metadata

    try:
        return f"fwp_lightning {metadata.version('fwp-lightning')}"
    except metadata.PackageNotFoundError:
        return "fwp_lightning, not installed"


# --- commands --------------------------------------------------------------------------------------------------------


def _sweep(options: argparse.Namespace) -> int:
    from fwp_lightning.experiment import at_points, find_project, load_experiment, reads_folder, resolve_runs
    from fwp_lightning.sweep import run_sweep, show_costs, show_plan
    from fwp_lightning.tracking import describe_origin

    project = find_project()
    prepare = _tie_to_files(options.imports, options.data)
    runs = [
        run
        for name in options.experiments
        for run in resolve_runs(
            load_experiment(name, project),
            profile=options.profile,
            protocol=options.protocol,
            rows=options.rows,
            seeds=options.seeds,
        )
    ]
    if options.points:
        runs = at_points(runs, options.points)
    runs = prepare(runs)
    if options.data is not None and not any(reads_folder(run) for run in runs):
        raise UserError(f"--data {options.data}: none of these runs reads a text; leave the option out.")
    resources = _resources(options)
    if options.measure:
        if not options.dry_run:
            raise UserError("--measure belongs to --dry-run.")
        show_costs(runs, options.imports)
        return 0
    if options.dry_run:
        show_plan(runs, project, options.jobs, options.imports)
        return 0
    origin = describe_origin(project, options.typed, options.imports)
    seconds = options.checkpoint_seconds
    return run_sweep(runs, project, origin, jobs=options.jobs, checkpoint_seconds=seconds, resources=resources)


def _resources(options: argparse.Namespace) -> Resources | None:
    """Return what SLURM jobs ask for, None where processes of this machine train."""
    given = {name: getattr(options, f"slurm_{name}") for name, *_ in resource_options()}
    asked = [f"--slurm-{name}" for name, value in given.items() if value is not None]
    asked += ["--slurm-option"] if options.slurm_option else []
    if options.executor != "slurm":
        if asked:
            raise UserError(f"{asked[0]} belongs to --executor slurm.")
        return None
    return read_resources(given, options.slurm_option)


def _tie_to_files(imports: Sequence[str], data: str | None) -> Callable[[list[Run]], list[Run]]:
    """Return what sets the folder of texts, and makes runs of the user's own files new runs once these have changed."""
    from fwp_lightning.data.corpora import hashes_of_folder
    from fwp_lightning.experiment import with_imports, with_texts
    from fwp_lightning.tracking import hashes_of

    hashes = hashes_of(imports)
    built_in = _built_in_parts() if hashes else set()
    # workers start elsewhere
    folder = None if data is None else str(Path(data).expanduser().resolve())
    # every run of a sweep reads the same one
    of_folder = functools.cache(hashes_of_folder)
    return lambda runs: with_texts(with_imports(runs, hashes, built_in), folder, of_folder)


def _built_in_parts() -> set[str]:
    """Return the suite's own rules and feature maps, without those that a user's file has registered already."""
    from fwp_lightning.attention import catalog

    live = [
        getattr(sys.modules.get(f"fwp_lightning.attention.{name}"), name.upper(), {}) for name in catalog.REGISTRIES
    ]
    users = {name for parts in live for name in parts if not parts[name].__module__.startswith("fwp_lightning.")}
    return {part.name for registry in catalog.REGISTRIES for part in catalog.parts(registry)} - users


def _generate(options: argparse.Namespace) -> int:
    from fwp_lightning.generation import Sampling, continue_text, load_trained

    _import_user_files(options.imports)
    try:
        sampling = Sampling(options.temperature, options.top_k)
    except ValueError as error:
        raise UserError(str(error)) from error
    trained = load_trained(Path(options.checkpoint))
    said = continue_text(
        trained, options.prompt, options.words, sampling, options.seed, functools.partial(print, end="", flush=True)
    )
    print()
    print(said, file=sys.stderr)
    return 0


def _status(options: argparse.Namespace) -> int:
    from fwp_lightning.experiment import experiment_names, find_project
    from fwp_lightning.results import project_status
    from fwp_lightning.sweep.progress import console, rows_table
    from fwp_lightning.tracking import open_store

    project = find_project()
    known = experiment_names(project)
    for name in options.experiments:
        if name not in known:
            raise UserError(f"unknown experiment {name!r}. {did_you_mean(name, known)}")
    if project.store_file is not None and not project.store_file.exists():
        print(f"no run is tracked yet: there is no {project.store_file}")
        return 0
    lines = project_status(
        open_store(project),
        project,
        options.experiments or known,
        complain=None if options.experiments else _warn,
        prepare=_tie_to_files(options.imports, options.data),
    )
    if lines:
        console().print(rows_table(lines))
    else:
        print("no run of these experiments is tracked yet")
    return 0


def _export(options: argparse.Namespace) -> int:
    from fwp_lightning.experiment import find_project
    from fwp_lightning.results import export
    from fwp_lightning.tracking import deliver_journals, open_store

    project = find_project()
    if project.store_file is not None and not project.store_file.exists():
        print(f"nothing to export: no run is tracked yet, there is no {project.store_file}")
        return 0
    client = open_store(project)
    deliver_journals(client, project)
    print(export(client, project).sentence())
    return 0


def _download(options: argparse.Namespace) -> int:
    from fwp_lightning.data.corpora import KNOWN_CORPORA, SPLITS, fetch_corpus, files_of_corpus
    from fwp_lightning.data.parallel_text import CORPORA as PARALLEL
    from fwp_lightning.data.parallel_text import read_corpus
    from fwp_lightning.data.token_files import open_token_files
    from fwp_lightning.experiment import find_project
    from fwp_lightning.sweep.progress import transfer_display

    data = find_project().data
    folder = data / options.corpus
    if (pairs := PARALLEL.get(options.corpus)) and pairs.files:
        with transfer_display(pairs.title) as show:
            fetch_corpus(pairs, folder, show)
        found = read_corpus(folder, "en", "de", pairs)
        print(f"{pairs.title} is in {folder}: " + ", ".join(f"{len(found[s].source):,} {s}" for s in SPLITS) + " pairs")
        return 0
    corpus = KNOWN_CORPORA.get(options.corpus)
    if corpus is None:
        known = [*KNOWN_CORPORA, *(name for name, parallel in PARALLEL.items() if parallel.files)]
        raise UserError(f"unknown corpus {options.corpus!r}. {did_you_mean(options.corpus, known)}")
    with transfer_display(corpus.title) as show:
        fetch_corpus(corpus, folder, show)
    say = functools.partial(print, flush=True)
    text = open_token_files(files_of_corpus(folder), data / "tokens", corpus, say)
    counts = ", ".join(f"{len(text.tokens[split]):,} {split}" for split in SPLITS)
    print(f"{corpus.title} is in {folder}: {counts} tokens, {len(text.vocabulary):,} words")
    return 0


def _build_kernels(options: argparse.Namespace) -> int:
    from fwp_lightning import compiled

    recipes = compiled.all_recipes(processor.levels_to_build(options.isa), cuda=options.cuda)
    failures = compiled.build_ahead(recipes, functools.partial(print, flush=True))
    for failure in failures:
        print(f"fwp: error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _warn(problem: object) -> None:
    print(f"fwp: warning: {problem}", file=sys.stderr)


def _report(arguments: Sequence[str]) -> int:
    return int(_reports_module("__main__").main(arguments) or 0)


def _verify(options: argparse.Namespace) -> int:
    from fwp_lightning.experiment import find_project

    return int(_reports_module("verification").verify(find_project(), _tie_to_files(options.imports, options.data)))


def _rerun(options: argparse.Namespace) -> int:
    from fwp_lightning.experiment import find_project
    from fwp_lightning.sweep.rerun import rerun
    from fwp_lightning.tracking import open_store

    project = find_project()
    prepare = _tie_to_files(options.imports, options.data)
    _import_user_files(options.imports)
    # a run that only the CSV files know needs no store, and none is made for it
    absent = project.store_file is not None and not project.store_file.exists()
    return rerun(options.run_key, None if absent else open_store(project), project, prepare, options.imports)


def _reports_module(name: str) -> Any:
    # reports lie beside the package
    source = str(Path(__file__).resolve().parent.parent)
    if source not in sys.path:
        sys.path.append(source)
    try:
        return importlib.import_module(f"reports.{name}")
    except ModuleNotFoundError as error:
        raise UserError(f"reports cannot be made: {error}; install the package anew.") from error


def _bench(options: argparse.Namespace) -> int:
    from fwp_lightning import bench
    from fwp_lightning.experiment import find_project
    from fwp_lightning.tracking import describe_origin

    _import_user_files(options.imports)
    request = bench.Request(
        parts=options.parts,
        device=options.device,
        shapes=options.shapes,
        sizes=options.sizes,
        rounds=options.rounds,
        peers=options.peers,
        quick=options.quick,
        save=not options.no_save,
    )
    project = find_project()
    return bench.run(request, project, describe_origin(project, options.typed), functools.partial(print, flush=True))


def _list(options: argparse.Namespace) -> int:
    from fwp_lightning.attention import catalog
    from fwp_lightning.experiment import find_project

    _import_user_files(options.imports)
    parts: dict[str, Sequence[Any]] = {
        **{registry: catalog.parts(registry) for registry in catalog.REGISTRIES},
        "backends": catalog.backends(),
        "kernels": catalog.kernels(),
        "paper_names": catalog.paper_names(),
    }
    listed = {name: [dataclasses.asdict(part) for part in found] for name, found in parts.items()}
    listed["experiments"] = _list_experiments(find_project(required=False))
    if options.json:
        print(json.dumps(listed, indent=1, ensure_ascii=False))
    else:
        _print_list(listed)
    return 0


def _list_experiments(project: Any) -> list[dict[str, Any]]:
    from fwp_lightning.experiment import View, experiment_names, load_experiment

    found = []
    for name in experiment_names(project):
        try:
            experiment = load_experiment(name, project)
        except UserError as error:
            _warn(error)
            continue
        trained = experiment.parent if isinstance(experiment, View) else experiment
        found.append(
            {
                "name": name,
                "title": experiment.title,
                "source": experiment.source,
                "runs_of": trained.name,
                "profiles": list(trained.profiles),
                "protocols": list(trained.protocols),
            }
        )
    return found


def _print_list(listed: dict[str, list[dict[str, Any]]]) -> None:
    _print_columns("experiments", [[e["name"], e["title"], e["source"]] for e in listed["experiments"]])
    for registry in ("rules", "feature_maps", "phi_norms"):
        title = registry.replace("_", " ").replace("phi norms", "normalisations of features (phi_norm)")
        _print_columns(title, [[part["name"], part["summary"]] for part in listed[registry]])
    for title, key in (("backends", "backends"), ("compiled for the retrieval task", "kernels")):
        rows = [[b["name"], ", ".join(b["rules"]), _availability(b)] for b in listed[key]]
        _print_columns(title, rows)
    names = [[p["name"], p["axes"], f"attn_type {p['attn_type']}"] for p in listed["paper_names"]]
    _print_columns("names in the paper, and attn_type in the released code", names)


def _availability(backend: dict[str, Any]) -> str:
    return f"available here: {'yes, ' if backend['available'] else 'no, because '}{backend['reason']}"


def _print_columns(title: str, rows: list[list[str]]) -> None:
    print(f"{title}:{'' if rows else ' none'}")
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print(f"  {'  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()}")
    print()


def _import_user_files(imports: Sequence[str]) -> None:
    from fwp_lightning.sweep.workers import import_file

    for name in imports:
        import_file(name)


def _run_fairseq(tool: str, arguments: Sequence[str], imports: Sequence[str]) -> int:
    from fwp_lightning.sweep.workers import import_file

    return fairseq_tools.run(tool, arguments, [functools.partial(import_file, name) for name in imports])


def _run_lightning(arguments: list[str], imports: Sequence[str], typed: Sequence[str]) -> int:
    from fwp_lightning.experiment import find_project
    from fwp_lightning.sweep.single import run_single
    from fwp_lightning.tracking import describe_origin

    project = find_project()
    _import_user_files(imports)
    return run_single(arguments, project, describe_origin(project, typed, imports))


if __name__ == "__main__":
    sys.exit(main())
