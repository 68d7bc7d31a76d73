"""The command line: a table of thin commands. Heavy modules are imported when a command runs."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise import __version__
from rankwise.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from rankwise.schema import Recipe

Arguments = argparse.Namespace

# Libraries that, where they are installed, tell at import which of their parts do not fit this machine.
NOISY = ("torchao", "bitsandbytes", "torch.utils._pytree")


def demo(arguments: Arguments, console: Console) -> Any:
    """Run the whole main job on an embedded synthetic log, or on your own files: SFT, DPO, softmax-DPO, compared."""
    from rankwise.demo import demo_recipe
    from rankwise.run import Run

    return Run(demo_recipe(arguments, console), console)()


def train(arguments: Arguments, console: Console) -> Any:
    """Run a recipe: data, stages, evaluation, export, report."""
    recipe = _recipe(arguments)  # first: a mistake in it is told before torch is imported
    from rankwise.run import Run

    return Run(recipe, console, resume=arguments.resume)()


def prepare(arguments: Arguments, console: Console) -> Any:
    """Write the rows of a recipe's interactions as JSONL with prompt, chosen and rejected, for any trainer."""
    recipe = _recipe(arguments)  # first: a mistake in it is told before torch is imported
    from rankwise.recommend.cluster import check_cluster, over_cluster
    from rankwise.recommend.prepare import WrittenRows, write_interactions
    from rankwise.recommend.rows import write_rows
    from rankwise.schema import InteractionData, RecommendationSettings
    from rankwise.tasks.load import check_files, interaction_settings, prepare

    if not isinstance(recipe.data, RecommendationSettings):
        raise UserError(f"data of kind {recipe.data.kind} has no rows to prepare: use interactions or sdpo")
    check_files(recipe.data)
    if arguments.cluster:
        check_cluster()
    folder = Path(arguments.folder)
    if isinstance(recipe.data, InteractionData):
        spread = over_cluster if arguments.cluster else map
        settings = interaction_settings(recipe.data, recipe.seed, recipe.evaluation.cases)
        found = write_interactions(folder, settings, spread)
    else:
        prepared = prepare(recipe.data, recipe.seed, recipe.evaluation.cases)
        found = WrittenRows(write_rows(folder, prepared, recipe.data.chat), prepared.counts, prepared.leaks)
    for name, count in (found.counts | found.leaks).items():
        console.print(f"  {name}: {count}", highlight=False)
    console.print(f"rows: {folder}", highlight=False)
    return {"folder": str(folder), "counts": found.counts, "leaks": found.leaks}


def init(arguments: Arguments, console: Console) -> Any:
    """Write a MiLoRA adapter's start for a whole model: read from its files one weight at a time, never loaded."""
    from dataclasses import asdict

    import torch

    from rankwise.directions import MiloraConfig
    from rankwise.directions.cache import default_folder
    from rankwise.directions.streaming import initialise
    from rankwise.models import quiet_libraries

    if arguments.rank < 1:
        raise UserError(f"--rank {arguments.rank} is not possible: it must be 1 or more")
    quiet_libraries()
    targets = arguments.target_modules
    config = MiloraConfig(
        r=arguments.rank,
        lora_alpha=arguments.alpha,
        rank_pattern=dict(arguments.rank_pattern),
        alpha_pattern=dict(arguments.alpha_pattern),
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        exclude_modules=arguments.exclude,
        use_rslora=arguments.rslora,
        use_dora=arguments.dora,
        part=arguments.part,
        part_seed=arguments.seed,
        cache=None if arguments.no_cache else arguments.cache or str(default_folder()),
        start_device=arguments.device,
    )
    report = initialise(arguments.model, arguments.out, config, dtype=getattr(torch, arguments.dtype), console=console)
    reused = f", {report.reused} from the cache" if report.reused else ""
    console.print(f"start: {arguments.out}: {len(report.ranks)} matrices in {report.seconds:.0f} s{reused}")
    if report.broken:
        console.print(f"  damaged files of the cache, made again: {report.broken}")
    if report.zero:
        console.print(f"  matrices with directions of singular value 0: {len(report.zero)}")
    return {"folder": arguments.out, **asdict(report)}


def evaluate(arguments: Arguments, console: Console) -> Any:
    """Measure a finished run's adapter again, on another part of its data if wanted."""
    from rankwise.evaluation import evaluate_run

    return evaluate_run(Path(arguments.run), arguments.overrides, console)


def recommend(arguments: Arguments, console: Console) -> Any:
    """Show the best titles of the whole catalogue for a user or a history, or write those of all users as Parquet."""
    from rankwise.recommend.cluster import check_cluster
    from rankwise.recommending import load_recommender, recommend_once, recommend_to_folder

    if arguments.cluster:
        check_cluster()
    names = {"candidates": arguments.candidates, "users": arguments.users, "cluster": arguments.cluster}
    unused = [name for name, value in names.items() if value and (arguments.out is None) == (name != "candidates")]
    if unused:
        raise UserError(f"--{unused[0]} {'needs' if arguments.out is None else 'cannot be with'} --out")
    users = None if arguments.users is None else _lines(Path(arguments.users))
    options = {
        "top": arguments.top,
        "exclude_seen": not arguments.include_seen,
        "length_normalised": arguments.normalise,
        "most_nodes": arguments.most_nodes,
    }
    recommender = load_recommender(arguments.run, arguments.stage)
    if arguments.out is not None:
        settings = {"run": str(Path(arguments.run).resolve()), "stage": arguments.stage}
        folder = Path(arguments.out)
        whom = {"users": users, "cluster": arguments.cluster}
        return recommend_to_folder(recommender, folder, console, settings=settings, **whom, **options)
    return recommend_once(
        recommender,
        console,
        user=arguments.user,
        history=arguments.history,
        candidates=arguments.candidates,
        **options,
    )


def serve(arguments: Arguments, console: Console) -> Any:
    """Answer over HTTP what a run recommends, with a page that compares its stages: until it is stopped."""
    from rankwise.serving.settings import ServerSettings, read_token

    token = read_token(None if arguments.token_file is None else Path(arguments.token_file))
    names = ("host", "port", "batch", "queue", "timeout")
    limits = {name: getattr(arguments, name) for name in names}
    settings = ServerSettings(token=token, hosts=tuple(arguments.allow_host), **limits)
    try:
        from rankwise.serving.server import serve_run
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}: pip install 'rankwise[serve]'") from error
    return {"address": serve_run(Path(arguments.run), arguments.stage, settings, console)}


def export(arguments: Arguments, console: Console) -> Any:
    """Write a run's adapter, or one from its own folder, as plain LoRA of a smaller rank or as merged weights."""
    from rankwise.evaluation import export_folder

    return export_folder(
        Path(arguments.source),
        Path(arguments.folder),
        console,
        stage=arguments.stage,
        model=arguments.model,
        rank=arguments.rank,
        energy=arguments.energy,
        layout=arguments.layout,
    )


def inspect(arguments: Arguments, console: Console) -> Any:
    """Show an adapter's ranks, parameters and bytes: module by module, and layers by kinds of module."""
    from rankwise.analysis.inspection import grid_table, inspection, rank_table
    from rankwise.analysis.ranks import read_adapter

    rows, counts = read_adapter(Path(arguments.adapter))
    console.print(rank_table(rows, counts))
    console.print(grid_table(rows))
    return inspection(rows, counts)


def report(arguments: Arguments, console: Console) -> Any:
    """Write a run's page; of several runs that differ in their seed, print mean and standard deviation."""
    from rankwise.analysis.report import write_report
    from rankwise.analysis.tables import combined, result_markdown, result_table

    runs = [Path(run) for run in arguments.runs]
    if len(runs) == 1:
        page = write_report(runs[0])
        console.print(f"report: {page}", highlight=False)
        return {"report": str(page)}
    results = combined(runs)
    if arguments.markdown:
        console.print(result_markdown(results), markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(result_table(results))
    return results


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="rankwise",
        description="Low-rank fine-tuning: which directions (MiLoRA), how many (SoRA), in what order (softmax-DPO).",
    )
    top.add_argument("--version", action="version", version=f"rankwise {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    made = _add(commands, demo, "rankwise demo --ratings ratings.csv --items movies.csv")
    made.add_argument("--ratings", metavar="FILE", help="your interactions: CSV, TSV, JSONL or Parquet")
    made.add_argument("--items", metavar="FILE", help="your items with their titles")
    made.add_argument("--output", metavar="FOLDER", help="the run's folder (runs/demo, or the next free number)")
    made.add_argument("--seed", type=int, default=0, help="of all draws (%(default)s)")

    made = _add(commands, train, "rankwise train recipe.yaml stages.0.epochs=2 output=runs/two-epochs")
    _recipe_arguments(made)
    made.add_argument("--resume", action="store_true", help="go on with an unfinished run of the same recipe")

    made = _add(commands, prepare, "rankwise prepare recipe.yaml rows/ data.negatives=5")
    made.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    made.add_argument("folder", metavar="FOLDER", help="where train.jsonl, validation.jsonl and test.jsonl go")
    made.add_argument("--cluster", action="store_true", help="work on a log on the Ray cluster of RAY_ADDRESS")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")

    _init_arguments(_add(commands, init, "rankwise init meta-llama/Llama-3.2-1B --part minor --rank 64 --out start/"))

    made = _add(commands, evaluate, "rankwise evaluate runs/films evaluation.split=validation")
    made.add_argument("run", metavar="RUN", help="a run's folder")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")

    _recommend_arguments(_add(commands, recommend, "rankwise recommend runs/films --history 'Heat (1995)' --top 5"))

    _serve_arguments(_add(commands, serve, "rankwise serve runs/films --port 8000"))

    made = _add(commands, export, "rankwise export runs/films smaller/ --rank 8")
    made.add_argument("source", metavar="SOURCE", help="a run's folder, or an adapter's: a trainer's checkpoint, say")
    made.add_argument("folder", metavar="FOLDER", help="where the adapter goes")
    made.add_argument("--stage", help="the stage of a run to export (the last)")
    made.add_argument("--model", help="base of an adapter: a folder, a hub id, or 'embedded' (the one it names)")
    made.add_argument("--rank", type=int, help="largest rank to keep")
    made.add_argument("--energy", type=float, help="share of each update's squared norm to keep, above 0, at most 1")
    forms = ("uniform", "compact", "merged")
    made.add_argument("--layout", choices=forms, default="uniform", help="form of the adapter (%(default)s)")

    made = _add(commands, inspect, "rankwise inspect runs/films/adapter")
    made.add_argument("adapter", metavar="ADAPTER", help="an adapter's folder")

    made = _add(commands, report, "rankwise report runs/films-0 runs/films-1 runs/films-2")
    made.add_argument("runs", nargs="+", metavar="RUN", help="one run for its page, or several for a table")
    made.add_argument("--markdown", action="store_true", help="print the table of several runs as markdown")
    return top


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, or 2 after a user's mistake, or 1 after a failure."""
    from rich.console import Console

    arguments = _parse(words)
    for library in NOISY:
        logging.getLogger(library).setLevel(logging.ERROR)
    console = Console(stderr=arguments.json)
    if not console.is_terminal:
        console = Console(stderr=arguments.json, width=140)
    try:
        result = arguments.run_command(arguments, console)
    except UserError as error:
        print(f"rankwise: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rankwise: interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        traceback.print_exc()
        print(f"rankwise: failed: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(result, ensure_ascii=False))
    return 0


def _parse(words: Sequence[str] | None) -> Arguments:
    """The arguments of a command; its list may go on after an option, which argparse refuses before Python 3.12.7."""
    top = parser()
    arguments, more = top.parse_known_args(words)
    listed = next((name for name in ("overrides", "runs") if hasattr(arguments, name)), None)
    if more and (listed is None or any(word.startswith("-") for word in more)):
        top.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        setattr(arguments, str(listed), [*getattr(arguments, str(listed)), *more])
    return arguments


def _add(commands: Any, function: Callable[..., Any], example: str) -> argparse.ArgumentParser:
    """A command named and described as its function, with an example."""
    text = (function.__doc__ or "").strip()
    made: argparse.ArgumentParser = commands.add_parser(
        function.__name__, help=text.partition(":")[0].rstrip("."), description=text, epilog=f"example: {example}"
    )
    made.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    made.set_defaults(run_command=function)
    return made


def _recipe_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")


def _init_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("model", metavar="MODEL", help="a folder with safetensors, a hub id, or 'embedded'")
    made.add_argument("--out", required=True, metavar="FOLDER", help="where the start goes")
    made.add_argument("--rank", type=int, default=64, help="of each matrix (%(default)s)")
    parts = ("minor", "principal", "middle", "random")
    made.add_argument("--part", choices=parts, default="minor", help="of each weight's spectrum (%(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of the draw of --part random (%(default)s)")
    made.add_argument("--alpha", type=float, help="numerator of the scaling (the rank)")
    made.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(rank), not alpha / rank")
    made.add_argument("--dora", action="store_true", help="train a magnitude for each output too (DoRA)")
    made.add_argument(
        "--target-modules", nargs="+", default=["all-linear"], metavar="NAME", help="modules to adapt (all-linear)"
    )
    made.add_argument("--exclude", nargs="+", metavar="NAME", help="modules to leave out")
    pairs: dict[str, Any] = {"nargs": "+", "type": _pair, "default": [], "metavar": "NAME=NUMBER"}
    made.add_argument("--rank-pattern", **pairs, help="other ranks, by a module's name or a pattern of names")
    made.add_argument("--alpha-pattern", **pairs, help="other alphas, likewise")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of what is written")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (%(default)s)")
    keep = made.add_mutually_exclusive_group()
    keep.add_argument("--cache", metavar="FOLDER", help="of finished matrices (~/.cache/rankwise/starts)")
    keep.add_argument("--no-cache", action="store_true", help="keep no finished matrices and use none")


def _recommend_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("run", metavar="RUN", help="the folder of a run on interactions or published lists")
    whom = made.add_mutually_exclusive_group(required=True)
    whom.add_argument("--user", help="of the run's log")
    whom.add_argument("--history", nargs="+", metavar="TITLE", help="titles or item ids, oldest first")
    whom.add_argument("--out", metavar="FOLDER", help="for the Parquet files of many users; all of the log")
    made.add_argument("--users", metavar="FILE", help="with --out: only these, one on each line")
    made.add_argument("--cluster", action="store_true", help="with --out: on the Ray cluster of RAY_ADDRESS")
    made.add_argument("--candidates", nargs="+", metavar="TITLE", help="rank these instead of the whole catalogue")
    made.add_argument("--top", type=int, default=10, help="titles for each (%(default)s)")
    made.add_argument("--stage", help="whose adapter to take (the last)")
    made.add_argument("--include-seen", action="store_true", help="titles of the history may be recommended again")
    made.add_argument("--normalise", action="store_true", help="rank by log-probability per token, not per title")
    made.add_argument("--most-nodes", type=int, metavar="N", help="tokens of titles to read at most (all that matter)")


def _serve_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("run", metavar="RUN", help="the folder of a run on interactions or published lists")
    made.add_argument("--stage", nargs="+", metavar="STAGE", help="stages to serve (all, and the base model)")
    made.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    made.add_argument("--port", type=int, default=8000, help="to listen on; 0 for any that is free (%(default)s)")
    names = "names to be asked by, such as a reverse proxy's"
    made.add_argument("--allow-host", nargs="+", default=[], metavar="NAME", help=names)
    made.add_argument("--token-file", metavar="FILE", help="with the token that requests must carry (RANKWISE_TOKEN)")
    made.add_argument("--batch", type=int, default=16, help="most requests answered together (%(default)s)")
    made.add_argument("--queue", type=int, default=128, help="most requests that wait (%(default)s)")
    made.add_argument("--timeout", type=float, default=30.0, help="seconds for each request (%(default)s)")


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--users {path} cannot be read as text: {error}") from error


def _pair(word: str) -> tuple[str, int]:
    """The two sides of ``name=number``."""
    name, _, number = word.rpartition("=")
    if not name or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{word!r} is no NAME=NUMBER")
    return name, int(number)


def _recipe(arguments: Arguments) -> Recipe:
    from rankwise.recipes import load_recipe

    return load_recipe(arguments.recipe, arguments.overrides)


if __name__ == "__main__":
    sys.exit(main())
