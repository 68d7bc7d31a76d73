"""When does preference training help a recommender that is a language model?

The shipped model learns to name the next artist (LastFM as the S-DPO authors publish it; train rebuilt from LLaRA's
windows, candidates by seed) or film (ml-latest-small). After supervised fine-tuning it is trained by DPO and by
softmax-DPO, one factor at a time around a default (`study_plan.py`), and by more supervised steps of as many tokens.
All choices are made on validation, where each run is compared with its start case by case; ``--stage test`` then
measures what was chosen, with three seeds.

    export RANKWISE_DATA=../shared/data HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
    python benchmarks/preference_study.py --out runs/preference.jsonl --work runs/preference
    python benchmarks/preference_study.py --out runs/preference.jsonl --work runs/preference --stage test
    python benchmarks/preference_study.py --out runs/preference.jsonl --table

Results are written as they come, a JSON line each. The same command goes on where it was stopped, and several of them,
started with the same file and folder, share the work. Supervised models, prepared rows and the reference's values are
kept in the folder; a supervised model that is missing there is trained again. Each run has a process of its own, which
imports the library anew: leave its code alone meanwhile, or run a copy of it. Times are those of the processor, on one
thread; all is computed in float32.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from result_file import ResultFile
from study_data import TEMPLATES
from study_plan import BASE, POPULARITY, Entry, Run, finals, needed, of, plan, short_runs, spec, supervised_rate
from study_tables import line, report
from timing import machine

# For an estimate before the first run: milliseconds on one core of the machine in docs/log.md, of a row of supervised
# training, of one of preferences without and for each negative, and of the 20 candidates of a case or of a reference.
SUPERVISED, PREFERENCE, NEGATIVE, CANDIDATES, GENERATION = 65, 40, 5, 40, 50
SCALE = {("lastfm", False): 1.0, ("lastfm", True): 3.0, ("movielens", False): 1.7, ("movielens", True): 5.0}
MINED = 1.7  # times as long with hard negatives
START_SECONDS = 20
CASES = {("lastfm", "validation"): 800, ("lastfm", "test"): 2495}
FILM_CASES = 609


class Results(ResultFile):
    """Finished runs, a JSON line each after a first one about the machine; a finished run is not run again."""

    def open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(json.dumps({"machine": machine(1), "precision": "float32"}) + "\n")
        except FileExistsError:
            pass


def claim(run: Run, work: Path) -> Path | None:
    """A file that says which process runs this; None where another that is alive does."""
    path = work / "claims" / hashlib.sha256(run.name.encode()).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        try:
            with path.open("x") as file:
                file.write(str(os.getpid()))
            return path
        except FileExistsError:
            if is_alive(path):
                return None
            path.unlink(missing_ok=True)
    return None


def is_alive(path: Path) -> bool:
    """Whether the process whose number is in the file runs."""
    try:
        os.kill(int(path.read_text()), 0)
    except (ProcessLookupError, FileNotFoundError):
        return False
    except ValueError:
        return True  # it was made, and is about to be written
    return True


def in_own_process(run: Run, work: Path) -> Entry:
    """Run once; what the process prints last is its entry."""
    script = str(Path(__file__).with_name("study_run.py"))
    command = [sys.executable, script, json.dumps(spec(run)), str(work)]
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    if done.returncode:
        raise SystemExit(f"a run failed: {run.name}\n{done.stderr[-3000:]}")
    found: Entry = json.loads(done.stdout.splitlines()[-1])
    return found


def wanted(entries: list[Entry], options: argparse.Namespace) -> list[tuple[str, Run]]:
    """Groups and runs of the stage that the command is for."""
    stage = plan if options.stage == "validation" else finals
    found = [pair for data in options.data for pair in stage(entries, data)]
    texts = options.only or [""]
    return [(group, run) for group, run in found if any(text in f"{group}: {run.name}" for text in texts)]


def left(entries: list[Entry], options: argparse.Namespace) -> list[Run]:
    """Runs that are not finished, with the supervised ones that they need, in order and once each."""
    done = {of(one) for one in entries}
    everything = [run for data in options.data for stage in (plan, finals) for _, run in stage(entries, data)]
    found: dict[Run, None] = {}
    for _, run in wanted(entries, options):
        chain = [run]
        while (before := needed(chain[0], everything)) is not None:
            chain.insert(0, before)
        if run in done:
            continue
        if needs_rate(run):
            found |= dict.fromkeys(one for one in short_runs(run.data) if one not in done)
        found |= dict.fromkeys(one for one in chain[:-1] if one not in done or not is_made(one.folder, options))
        found[run] = None
    return list(found)


def is_made(start: str, options: argparse.Namespace) -> bool:
    """Whether the model is in the folder; without a folder, as when only an estimate is asked for, it is assumed."""
    return options.work is None or (options.work / "starts" / start).is_dir()


def needs_rate(run: Run) -> bool:
    """Whether it is, or begins with, a supervised run at the rate that was best with few rows."""
    return run.kind != "measure" and run not in short_runs(run.data)


def ready(run: Run, entries: list[Entry], options: argparse.Namespace) -> bool:
    """Whether the rate of supervised training is known, and the model that the run begins with is there."""
    if needs_rate(run) and supervised_rate(entries, run.data) is None:
        return False
    return run.start in (BASE, POPULARITY) or is_made(run.start, options)


def work_off(results: Results, options: argparse.Namespace) -> None:
    """Take the first run that is ready and nobody's, until none is left."""
    while runs := left(results.entries, options):
        entries = results.entries
        free = ((run, claim(run, options.work)) for run in runs if ready(run, entries, options))
        run, path = next(((run, path) for run, path in free if path is not None), (None, None))
        if run is None or path is None:
            alone = not any(map(is_alive, (options.work / "claims").glob("*")))
            if alone and len(results.entries) == len(entries):
                raise SystemExit(f"{len(runs)} runs have no start: {runs[0].start} is not in {options.work / 'starts'}")
            time.sleep(5)
            continue
        try:
            known = run in {of(one) for one in results.entries}
            if not known or (run.kind == "supervised" and not is_made(run.folder, options)):
                entry = in_own_process(run, options.work)
                print(line(entry), flush=True)
                if not known:
                    results.add(entry)
        finally:
            path.unlink(missing_ok=True)


def seconds_of(run: Run) -> float:
    """An estimate, with the reference's values computed."""
    scale, cases = SCALE[run.data, run.listed], CASES.get((run.data, run.split), FILM_CASES)
    milliseconds = float(CANDIDATES * cases)
    if run.kind == "supervised":
        milliseconds += SUPERVISED * run.rows
    elif run.kind == "preference":
        row = PREFERENCE + NEGATIVE * run.negatives
        milliseconds += run.passes * run.rows * row * (MINED if run.source == "hard" else 1)
        milliseconds += CANDIDATES * run.rows * (run.source == "candidates") * (run.weights == "all" or run.seed != 0)
    elif run.kind == "more":
        milliseconds += 1.4 * run.rows * SUPERVISED
    if run.split == "test":
        milliseconds += GENERATION * cases
    return START_SECONDS + (0 if run.start == POPULARITY else scale * milliseconds / 1000)


def estimate(results: Results, options: argparse.Namespace) -> str:
    """What is left to do, by the times measured so far."""
    entries, runs = results.entries, left(results.entries, options)
    ratios = [one["seconds"]["all"] / seconds_of(of(one)) for one in entries if of(one).kind != "measure"]
    factor = statistics.median(ratios) if ratios else 1.0
    longest = max(map(seconds_of, runs), default=0.0)
    hours = factor * sum(map(seconds_of, runs)) / 3600
    typical = factor * statistics.median(map(seconds_of, runs)) / 60 if runs else 0.0
    each = f"half of them take less than {typical:.1f} minutes, the longest {factor * longest / 60:.0f}"
    return f"{len(runs)} runs are left, about {hours:.1f} hours of one core; {each}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of results, made or continued")
    parser.add_argument("--work", type=Path, help="folder of models, rows and the reference's values")
    parser.add_argument("--stage", choices=("validation", "test"), default="validation", help="(%(default)s)")
    parser.add_argument("--data", nargs="+", choices=TEMPLATES, default=list(TEMPLATES), help="in this order (all)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="runs whose 'group: name' has one of these texts")
    parser.add_argument("--list", action="store_true", help="print the runs that are left only")
    parser.add_argument("--estimate", action="store_true", help="print how long they would take only")
    parser.add_argument("--table", action="store_true", help="print the tables of a file of results only")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    results = Results(options.out)
    if options.table:
        print(report(results.lines, options.data))
        return
    if options.list:
        print("\n".join(f"{seconds_of(run) / 60:5.1f} min  {run.name}" for run in left(results.entries, options)))
    print(estimate(results, options), flush=True)
    if options.list or options.estimate:
        return
    if options.work is None:
        raise SystemExit("say where models and rows are kept: --work FOLDER")
    results.open()
    work_off(results, options)
    print(report(results.lines, options.data))


if __name__ == "__main__":
    main()
