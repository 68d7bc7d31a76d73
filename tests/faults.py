"""Commands that are killed at any moment and started again: ``python tests/faults.py --kills 100``.

Each attempt begins with nothing, kills the command once or several times, each time in another place, looks at what
it left, and starts it again until it ends. What it leaves then must be what an undisturbed command leaves.

A command is killed after a random time, by SIGKILL, SIGTERM or SIGINT, or at one of its file operations (before a file
is opened, a folder made, something renamed or removed), by SIGKILL; or it may write no file above a random size, as on
a disk that is full, and must say so in one line. Processes are forked from one that has imported
most libraries, so that the time of an attempt is the command's own; it computes nothing itself, since threads do not
survive a fork.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import transformers.trainer
import yaml
from safetensors import safe_open

from conftest import byte_tokenizer, save_base
from rankwise.files import MANIFEST, check_folder

assert peft and transformers.trainer  # forked processes have them; polars, whose threads do not survive, is not here
LONGEST = 300.0  # seconds of a command
SAID = Path(tempfile.gettempdir()) / f"faults-{os.getpid()}.log"  # what the last process said
EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TIMED = ("seconds", "peak_memory", "train_runtime", "train_samples_per_second", "train_steps_per_second", "steps_timed")


@dataclass(frozen=True)
class Job:
    """A command to be killed.

    Attributes:
        words: of the command, for a folder to work in.
        outcome: what an undisturbed command and a disturbed one must have in common.
    """

    words: Callable[[Path], list[str]]
    outcome: Callable[[Path], Any]


def jobs(base: Path, run: Path) -> dict[str, Job]:
    """Every kind of work that takes long, on a small model and a small finished run."""
    text = Path(run.parent)
    return {
        "train": Job(lambda folder: ["train", str(text / "train.yaml"), f"output={folder / 'run'}"], run_outcome),
        "init": Job(
            lambda folder: ["init", str(base), "--rank", "2", "--out", str(folder / "start"), "--no-cache"],
            lambda folder: contents(folder / "start"),
        ),
        "export": Job(
            lambda folder: ["export", str(run), str(folder / "merged"), "--layout", "merged"],
            lambda folder: contents(folder / "merged"),
        ),
        "prepare": Job(
            lambda folder: ["prepare", str(text / "prepare.yaml"), str(folder / "rows")],
            lambda folder: contents(folder / "rows"),
        ),
        "compare": Job(
            lambda folder: ["compare", str(text / "compare.yaml"), f"output={folder / 'compared'}"],
            lambda folder: compared(folder / "compared"),
        ),
    }


def prepared(base: Path, folder: Path) -> dict[str, Job]:
    """Write a base, recipes and a finished run; returns the jobs on them."""
    folder.mkdir()
    assert wait(forked(lambda: write_recipes(base, folder))) == 0
    run = folder / "run"
    assert ended(["train", str(folder / "train.yaml"), f"output={run}"]) == 0
    return jobs(base, run)


def write_recipes(base: Path, folder: Path) -> int:
    """Of a training with two stages, and of a comparison."""
    import small_runs
    from rankwise.recipes import dump_recipe

    save_base(byte_tokenizer(), base)
    stages = [small_runs.SFT | {"batch_size": 4}, small_runs.DPO | {"name": "softmax-DPO", "negatives": 2}]
    changes: dict[str, Any] = {"stages": stages, "checkpoint_seconds": 0.0, "adapter": {"kind": "milora", "r": 2}}
    recipe = small_runs.recipe("interactions", folder / "data", base, evaluation={"cases": 4}, **changes)
    for name in ("train", "prepare"):
        (folder / f"{name}.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    text = small_runs.values("text", folder / "text", base)
    shared = {"model": text["model"], "data": text["data"], "stages": [small_runs.SFT]}
    comparison = {
        "methods": [{"kind": "lora", "r": 2}, {"kind": "milora", "r": 2}],
        "shared": shared | {"data": text["data"] | {"validation": text["data"]["train"]}},
        "tasks": {"text": {}},
        "learning_rates": [1e-3],
        "seeds": [0],
        "processes": 2,
        "output": "-",
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(comparison), encoding="utf-8")
    return 0


def contents(folder: Path) -> dict[str, Any]:
    """The files of a folder by their hashes, configs and manifests by what they say."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found: dict[str, Any] = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    for name in list(found):
        if name.endswith("adapter_config.json"):
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            found[name] = {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}
        if Path(name).name == MANIFEST:
            found[name] = sorted(json.loads((folder / name).read_text(encoding="utf-8")))
    return found


def run_outcome(folder: Path) -> dict[str, Any]:
    """Of a run: its adapter and stages, its results, and what it logged."""
    run = folder / "run"
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found: dict[str, Any] = {name: contents(run / name) for name in ("adapter", "stages", "store", "cases")}
    found |= {"files": sorted(path.name for path in run.iterdir())}
    return found | {"results": untimed(results), "metrics": untimed(lines)}


def compared(folder: Path) -> dict[str, Any]:
    """Of a comparison: the figures of its table, but for times and memory."""
    rows = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["rows"]
    figures = [{name: row[name] for name in ("task", "method", "metrics", "parameters")} for row in rows]
    return {"rows": figures, "files": sorted(path.name for path in folder.iterdir())}


def untimed(value: Any) -> Any:
    """Without times and memory, at any depth."""
    if isinstance(value, dict):
        return {name: untimed(inner) for name, inner in value.items() if name not in TIMED}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def look(folder: Path) -> None:
    """See that nothing in the folder loads wrongly: what has its name is whole, and folders are what they say."""
    visible = [
        path
        for path in folder.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts) and path.is_file()
    ]
    for path in visible:
        if path.name == MANIFEST:
            check_folder(path.parent, whole=True)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".yaml":
            yaml.safe_load(path.read_text(encoding="utf-8"))
        elif path.suffix == ".parquet":
            content = path.read_bytes()
            assert content.startswith(b"PAR1") and content.endswith(b"PAR1")
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                file.keys()


# Processes


def forked(work: Callable[[], int], at: int | None = None, count: Path | None = None, most: int | None = None) -> int:
    """Do some work in a process of its own.

    It kills itself at its ``at``-th file operation, or counts them, or writes no file above ``most`` bytes.
    """
    process = os.fork()
    if process:
        return process
    status, seen = 70, 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in EVENTS and (event != "open" or "w" in str(arguments[1]) or "x" in str(arguments[1])):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        os.setpgrp()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where the shell runs this aside
        said = os.open(SAID, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        if most is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        if at is not None or count is not None:
            sys.addaudithook(watch)
        status = work()
        if count is not None:
            count.write_text(str(seen))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def command(words: Sequence[str]) -> int:
    """Run a command in this process; its status."""
    from rankwise.cli import main

    return main(words)


def wait(process: int, seconds: float = LONGEST) -> int | None:
    """The status of a process, negative for a signal; None where it has not ended by then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def ended(words: Sequence[str], count: Path | None = None) -> int:
    """Run a command to its end; its status."""
    process = forked(lambda: command(words), count=count)
    status = wait(process)
    if status is None:
        os.killpg(process, signal.SIGKILL)
        raise AssertionError(f"{' '.join(words)} has not ended after {LONGEST:.0f} s")
    return status


@dataclass(frozen=True)
class Undisturbed:
    """What a command leaves, how long it takes, how many file operations it has, and the size of its largest file."""

    outcome: Any
    seconds: float
    operations: int
    largest: int


def undisturbed(job: Job, folder: Path) -> Undisturbed:
    """Run a job as it is meant to be."""
    folder.mkdir()
    begun = time.monotonic()
    assert ended(job.words(folder), folder.with_name(f"{folder.name}-count")) == 0
    operations = int(folder.with_name(f"{folder.name}-count").read_text())
    largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Undisturbed(job.outcome(folder), time.monotonic() - begun, operations, largest)


def attempt(job: Job, folder: Path, whole: Undisturbed, generator: random.Random) -> list[str]:
    """Kill a job up to three times, start it again, and compare; returns how it was killed."""
    folder.mkdir()
    killed = []
    for _ in range(generator.randint(1, 3)):
        how, status = kill_once(job.words(folder), whole, generator)
        killed += [how] if status != 0 else []
        look(folder)
        if status == 0:
            break
    status = 0 if status == 0 else ended(job.words(folder))
    said = SAID.read_text(encoding="utf-8", errors="replace")
    assert status == 0 or (killed and finished(job, folder, whole)), f"ended with {status} after {killed}: {said}"
    look(folder)
    found = job.outcome(folder)
    assert found == whole.outcome, f"after {killed}: {list(differences(found, whole.outcome))}"
    shutil.rmtree(folder)
    return killed


def finished(job: Job, folder: Path, whole: Undisturbed) -> bool:
    """Whether the job was killed after its last work: it may say then that it has nothing to do."""
    try:
        return bool(job.outcome(folder) == whole.outcome)
    except FileNotFoundError:
        return False


def kill_once(words: Sequence[str], whole: Undisturbed, generator: random.Random) -> tuple[str, int]:
    """Start a command and kill it; returns how, and its status."""
    kind = generator.random()
    if kind < 0.15:
        most = generator.randint(0, whole.largest)
        status = wait(forked(lambda: command(words), most=most))
        text = SAID.read_text(encoding="utf-8", errors="replace")
        assert status in (0, 1, 2) and "Traceback" not in text, f"files of {most} bytes: status {status}: {text}"
        return f"full at files of {most} bytes", status
    if kind < 0.6:
        at = generator.randint(1, whole.operations)
        status = wait(forked(lambda: command(words), at))
        assert status is not None, f"{words} hangs"
        return f"SIGKILL at file operation {at} of {whole.operations}", status
    number, after = generator.choice(SIGNALS), generator.uniform(0, whole.seconds)
    process = forked(lambda: command(words))
    status = wait(process, after)
    if status is None:
        os.kill(process, number)
        begun = time.monotonic()
        status = wait(process, 60.0)
        assert status is not None, f"{words} has not ended 60 s after {number.name}"
        assert time.monotonic() - begun < 30, f"{words} ended {time.monotonic() - begun:.0f} s after {number.name}"
    return f"{number.name} after {after:.1f} s of {whole.seconds:.1f}", status


def differences(found: Any, expected: Any, where: str = "") -> Iterator[str]:
    """Where two values differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in {*found, *expected}:
            yield from differences(found.get(name), expected.get(name), f"{where}.{name}")
    elif found != expected:
        yield f"{where}: {str(found)[:200]} != {str(expected)[:200]}"


def run_attempts(folder: Path, names: Sequence[str], kills: int, seed: int) -> collections.Counter[str]:
    """Attempts until there were so many kills in all, one of each job at least; counts by job and by kind."""
    known = prepared(folder / "base", folder / "made")
    wholes = {name: undisturbed(known[name], folder / f"whole-{name}") for name in names}
    generator, counts, number = random.Random(seed), collections.Counter[str](), 0
    while sum(counts[name] for name in names) < kills or not all(counts[name] for name in names):
        name = names[number % len(names)]
        number += 1
        for how in attempt(known[name], folder / f"attempt-{number}", wholes[name], generator):
            counts[name] += 1
            counts[how.split(" ")[0] + (" at a file operation" if "operation" in how else "")] += 1
            print(f"{name}: {how}", flush=True)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", default=["train", "init", "export", "prepare", "compare"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        for what, number in run_attempts(Path(place), options.jobs, options.kills, options.seed).items():
            print(f"{what}: {number}")
    SAID.unlink()
