"""The commands: each takes the command line's arguments and a console, and returns what ``--json`` prints.

They are thin, and import heavy modules when they run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import UserError
from rankwise.saying import say

if TYPE_CHECKING:
    from rich.console import Console

    from rankwise.schema import Recipe

Arguments = argparse.Namespace


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
    from rankwise.tasks.files import check_files
    from rankwise.tasks.load import interaction_settings, prepare

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
        say(console, f"  {name}: {count}")
    say(console, f"rows: {folder}")
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
    say(console, f"start: {arguments.out}: {len(report.ranks)} matrices in {report.seconds:.0f} s{reused}")
    if report.broken:
        say(console, f"  damaged files of the cache, made again: {report.broken}")
    if report.zero:
        say(console, f"  matrices with directions of singular value 0: {len(report.zero)}")
    return {"folder": arguments.out, **asdict(report)}


def evaluate(arguments: Arguments, console: Console) -> Any:
    """Measure a finished run's adapter again, on another part of its data if wanted."""
    from rankwise.evaluation import evaluate_run

    return evaluate_run(Path(arguments.run), arguments.overrides, console)


def recommend(arguments: Arguments, console: Console) -> Any:
    """Show the best titles of the whole catalogue for a user or a history, or write those of all users as Parquet."""
    from rankwise.files import check_output
    from rankwise.recommend.cluster import check_cluster
    from rankwise.recommending import asked_of, load_recommender, recommend_once, recommend_to_folder

    if arguments.cluster:
        check_cluster()
    names = {"candidates": arguments.candidates, "users": arguments.users, "cluster": arguments.cluster}
    unused = [name for name, value in names.items() if value and (arguments.out is None) == (name != "candidates")]
    if unused:
        raise UserError(f"--{unused[0]} {'needs' if arguments.out is None else 'cannot be with'} --out")
    for name in ("top", "most_nodes"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is not possible: it must be 1 or more")
    if arguments.out is not None:
        check_output(Path(arguments.out))
    users = None if arguments.users is None else _lines(Path(arguments.users))
    options = {
        "top": arguments.top,
        "exclude_seen": not arguments.include_seen,
        "length_normalised": arguments.normalise,
        "most_nodes": arguments.most_nodes,
    }
    named = [arguments.user] if arguments.user is not None else users or []
    recommender = load_recommender(arguments.run, arguments.stage, users=named, titles=arguments.history or [])
    if arguments.out is not None:
        settings = asked_of(Path(arguments.run).resolve(), arguments.stage)
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
    names = ("host", "port", "batch", "queue", "timeout", "rate")
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


def write(arguments: Arguments, console: Console) -> Any:
    """Answer a file of instructions with a run on instructions: a list of outputs in AlpacaEval's form."""
    from rankwise.writing import write_outputs

    options = {name: getattr(arguments, name) for name in ("tokens", "stage", "generator")}
    return write_outputs(Path(arguments.run), Path(arguments.instructions), Path(arguments.out), console, **options)


def inspect(arguments: Arguments, console: Console) -> Any:
    """Show an adapter's ranks, parameters and bytes: by module and layer; and where its updates lie in a model."""
    from rankwise.analysis.inspection import grid_table, inspection, rank_table
    from rankwise.analysis.ranks import read_adapter

    rows, counts = read_adapter(Path(arguments.adapter))
    console.print(rank_table(rows, counts))
    console.print(grid_table(rows))
    found = inspection(rows, counts)
    if arguments.model is None:
        return found
    from rankwise.adapters import load_adapter_folder
    from rankwise.analysis.place_tables import place_table
    from rankwise.analysis.places import update_places

    if arguments.directions < 1:
        raise UserError(f"--directions {arguments.directions} is not possible: it must be 1 or more")
    model = load_adapter_folder(Path(arguments.adapter), arguments.model)
    places, passed = update_places(model, arguments.directions)
    console.print(place_table(places))
    return found | {"updates": places, "counts": found["counts"] | passed}


def compare(arguments: Arguments, console: Console) -> Any:
    """Compare methods: settings chosen on held-out data, several seeds, a table with tests, costs and a report."""
    from rankwise.recipes import load_comparison

    comparison = load_comparison(arguments.comparison, arguments.overrides)  # before torch is imported
    if arguments.again is not None:
        from rankwise.comparing.again import run_again

        return run_again(comparison, arguments.again, console)
    from rankwise.comparing.compare import compare as run
    from rankwise.recommend.cluster import check_cluster

    if arguments.cluster:
        check_cluster()
    return run(comparison, console, arguments.cluster)


def methods(arguments: Arguments, console: Console) -> Any:
    """List every method: its paper, what it trains of a model, and whether the model's weights can take it up."""
    from rankwise.methods.listing import method_rows, method_table

    rows = method_rows(arguments.model, arguments.classes)
    console.print(method_table(rows))
    return {"model": arguments.model, "methods": rows}


def report(arguments: Arguments, console: Console) -> Any:
    """Write the page of a run or a comparison; of several runs that differ in their seed, print mean and deviation."""
    from rankwise.analysis.report import write_report
    from rankwise.analysis.tables import combined, result_markdown, result_table
    from rankwise.comparing.report import SUMMARY, write_comparison_report

    runs = [Path(run) for run in arguments.runs]
    if len(runs) == 1:
        page = write_comparison_report(runs[0]) if (runs[0] / SUMMARY).is_file() else write_report(runs[0])
        say(console, f"report: {page}")
        return {"report": str(page)}
    results = combined(runs)
    if arguments.markdown:
        say(console, result_markdown(results))
    else:
        console.print(result_table(results))
    return results


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--users {path} cannot be read as text: {error}") from error


def _recipe(arguments: Arguments) -> Recipe:
    from rankwise.recipes import load_recipe

    return load_recipe(arguments.recipe, arguments.overrides)
