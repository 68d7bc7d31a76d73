"""The command line: its words and options, as a table of `rankwise.commands`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from rankwise import __version__, commands
from rankwise.errors import Stopped, UserError, system_failure
from rankwise.files import to_json

Arguments = argparse.Namespace

# Libraries that, where they are installed, tell at import which of their parts do not fit this machine.
NOISY = ("torchao", "bitsandbytes", "torch.utils._pytree")
STOPPED = "stopped by "
FIRST_SPEAKS = 1.0  # seconds after which another process than the first says what is wrong


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = argparse.ArgumentParser(
        prog="rankwise",
        description="Low-rank fine-tuning: which directions (MiLoRA), how many (SoRA), in what order (softmax-DPO).",
    )
    top.add_argument("--version", action="version", version=f"rankwise {__version__}")
    table = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    made = _add(table, commands.demo, "rankwise demo --ratings ratings.csv --items movies.csv")
    made.add_argument("--ratings", metavar="FILE", help="your interactions: CSV, TSV, JSONL or Parquet")
    made.add_argument("--items", metavar="FILE", help="your items with their titles")
    made.add_argument("--output", metavar="FOLDER", help="the run's folder (runs/demo, or the next free number)")
    made.add_argument("--seed", type=int, default=0, help="of all draws (%(default)s)")

    made = _add(table, commands.train, "rankwise train recipe.yaml stages.0.epochs=2 output=runs/two-epochs")
    _recipe_arguments(made)
    made.add_argument(
        "--resume", action="store_true", help="go on even where the run is finished: write its report anew"
    )

    made = _add(table, commands.prepare, "rankwise prepare recipe.yaml rows/ data.negatives=5")
    made.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    made.add_argument("folder", metavar="FOLDER", help="where train.jsonl, validation.jsonl and test.jsonl go")
    made.add_argument("--cluster", action="store_true", help="work on a log on the Ray cluster of RAY_ADDRESS")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")

    _init_arguments(
        _add(table, commands.init, "rankwise init meta-llama/Llama-3.2-1B --part minor --rank 64 --out start/")
    )

    made = _add(table, commands.evaluate, "rankwise evaluate runs/films evaluation.split=validation")
    made.add_argument("run", metavar="RUN", help="a run's folder")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")

    _recommend_arguments(
        _add(table, commands.recommend, "rankwise recommend runs/films --history 'Heat (1995)' --top 5")
    )

    _serve_arguments(_add(table, commands.serve, "rankwise serve runs/films --port 8000"))

    made = _add(table, commands.export, "rankwise export runs/films smaller/ --rank 8")
    made.add_argument("source", metavar="SOURCE", help="a run's folder, or an adapter's: a trainer's checkpoint, say")
    made.add_argument("folder", metavar="FOLDER", help="where the adapter goes")
    made.add_argument("--stage", help="the stage of a run to export (the last)")
    made.add_argument("--model", help="base of an adapter: a folder, a hub id, or 'embedded' (the one it names)")
    made.add_argument("--rank", type=int, help="largest rank to keep")
    made.add_argument("--energy", type=float, help="share of each update's squared norm to keep, above 0, at most 1")
    forms = ("uniform", "compact", "own", "merged")
    made.add_argument("--layout", choices=forms, help="form of the adapter (the run's own; uniform of an adapter)")

    made = _add(table, commands.write, "rankwise write runs/alpaca alpaca_eval.jsonl outputs.json")
    made.add_argument("run", metavar="RUN", help="the folder of a run on instructions")
    made.add_argument("instructions", metavar="FILE", help="JSON or JSONL with a column instruction")
    made.add_argument("out", metavar="OUT", help="the JSON to write")
    made.add_argument("--tokens", type=int, default=512, help="most tokens of an answer (%(default)s)")
    made.add_argument("--stage", help="whose adapter to take (the last)")
    made.add_argument("--generator", metavar="NAME", help="what the answers are said to be from (the recipe's name)")

    made = _add(table, commands.compare, "rankwise compare comparison.yaml processes=2 output=runs/encoders")
    made.add_argument("comparison", metavar="COMPARISON", help="YAML with methods, tasks, learning_rates and seeds")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="values that replace the file's")
    made.add_argument("--cluster", action="store_true", help="run on the Ray cluster of RAY_ADDRESS")
    made.add_argument("--again", metavar="RUN", help="run this one again, beside what it gave before, and nothing else")

    made = _add(table, commands.methods, "rankwise methods --model models/llama --json")
    made.add_argument("--model", default="embedded", help="a folder, a hub id, or 'embedded' (%(default)s)")
    made.add_argument("--classes", type=int, metavar="N", help="count for a classifier of so many classes")

    made = _add(table, commands.inspect, "rankwise inspect runs/films/adapter")
    made.add_argument("adapter", metavar="ADAPTER", help="an adapter's folder")
    made.add_argument("--model", help="also where the updates lie in the weights of this model (not asked)")
    made.add_argument(
        "--directions", type=int, default=16, metavar="N", help="of each part of a spectrum (%(default)s)"
    )

    made = _add(table, commands.report, "rankwise report runs/films-0 runs/films-1 runs/films-2")
    made.add_argument("runs", nargs="+", metavar="RUN", help="one run for its page, or several for a table")
    made.add_argument("--markdown", action="store_true", help="print the table of several runs as markdown")
    return top


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, or 2 after a user's mistake, or 1 after a failure."""
    from rich.console import Console

    arguments = _parse(words)
    for library in NOISY:
        logging.getLogger(library).setLevel(logging.ERROR)
    console = Console(stderr=arguments.json, markup=False)  # names in tables are no markup either
    if not console.is_terminal:
        console.width = 140
    rank = os.environ.get("RANK", "")
    number = int(rank) if "LOCAL_RANK" in os.environ and rank.isdecimal() else 0  # among processes of torchrun
    if number:
        warnings.simplefilter("ignore")  # the first one shows them
    try:
        _check_alone(arguments.run_command)
        result = arguments.run_command(arguments, console)
    except UserError as error:
        _tell(str(error), number)
        return 2
    except (KeyboardInterrupt, Stopped) as reason:
        _tell(str(reason) or "interrupted", number)
        return 1
    except Exception as error:
        if (told := system_failure(error)) is not None:
            _tell(told, number)
            return 1
        traceback.print_exc()
        _tell(f"failed: {type(error).__name__}: {error}", number)
        return 1
    if arguments.json and not number:
        print(to_json(result))
    return 0


def _check_alone(command: Callable[..., Any]) -> None:
    """Refuse to do in several processes what one does."""
    if command not in (commands.train, commands.demo) and "LOCAL_RANK" in os.environ:
        if (number := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise UserError(
                f"{command.__name__} is for one process, and {number} were started: only train and demo share their "
                "work among processes of torchrun or accelerate"
            )


def _tell(message: str, number: int) -> None:
    """Print an error; what all processes have to say, the first one says before the others are ended."""
    if number and message.startswith(STOPPED):
        return  # all were, and the first one says it
    if number:
        time.sleep(FIRST_SPEAKS)
        message = f"process {number}: {message}"
    print(f"rankwise: {message}", file=sys.stderr, flush=True)


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


def _add(table: Any, function: Callable[..., Any], example: str) -> argparse.ArgumentParser:
    """A command named and described as its function, with an example."""
    text = (function.__doc__ or "").strip()
    made: argparse.ArgumentParser = table.add_parser(
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
    parts = ("minor", "principal", "middle", "random", "qr")
    made.add_argument("--part", choices=parts, default="minor", help="of each weight's spectrum, or qr (%(default)s)")
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
    made.add_argument("--rate", type=float, default=100.0, help="requests a second from one address (%(default)s)")


def _pair(word: str) -> tuple[str, int | float]:
    """The two sides of ``name=number``."""
    name, _, number = word.rpartition("=")
    try:
        value = int(number) if number.isdecimal() else float(number)
    except ValueError:
        name = ""
    if not name:
        raise argparse.ArgumentTypeError(f"{word!r} is no NAME=NUMBER")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
