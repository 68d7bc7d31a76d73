from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

import rankwise
import rankwise.demo
import small_runs
from rankwise.cli import main, parser
from rankwise.errors import UserError
from rankwise.recommend.synthetic import SyntheticSettings, write_synthetic

COMMANDS = [
    "demo",
    "train",
    "prepare",
    "init",
    "evaluate",
    "recommend",
    "serve",
    "export",
    "write",
    "compare",
    "methods",
    "inspect",
    "report",
]
HEAVY = ["torch", "transformers", "peft", "polars", "plotly", "pydantic"]


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    [commands] = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(commands.choices)


@pytest.fixture(scope="module")
def recipe(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over a small log: SFT, then softmax-DPO."""
    folder = tmp_path_factory.mktemp("recipe")
    values = small_runs.values("interactions", folder, model_folder)
    values["stages"] = [values["stages"][0] | {"epochs": 1}, values["stages"][2]]
    values["evaluation"] = {"cases": 6}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def runs(recipe: Path) -> list[Path]:
    """Two runs of it, which differ in their seed."""
    folders = [recipe.parent / f"run-{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        assert main(["train", str(recipe), f"output={folder}", f"seed={seed}"]) == 0
    return folders


def said(capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """What a command printed as JSON, and what it told people meanwhile."""
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    return json.loads(out), err


# Help


def test_every_command_is_there() -> None:
    assert list(command_parsers()) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_description_and_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    example = command_parsers()[command].epilog or ""
    assert " ".join(example.split()) in shown
    name, *words = shlex.split(example.removeprefix("example: "))
    assert name == "rankwise"
    assert parser().parse_args(words).command == command
    options = command_parsers()[command]._actions
    assert all(option.help for option in options)


def test_top_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if re.match(r"    \w", line)] == COMMANDS


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from rankwise.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as stopped:\n    print(stopped.code)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    for word in ("--help", "--version"):
        done = python("-c", code, word)
        assert done.stdout.splitlines()[-2:] == ["0", "[]"], done.stderr


def test_the_module_is_the_command() -> None:
    done = python("-m", "rankwise.cli", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"rankwise {rankwise.__version__}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["tran"], "invalid choice: 'tran'"),
        (["train"], "the following arguments are required: RECIPE"),
        (["train", "recipe.yaml", "--rseume"], "unrecognized arguments: --rseume"),
        (["inspect", "one", "two"], "unrecognized arguments: two"),
        (["export", "run", "out", "--layout", "merge"], "argument --layout: invalid choice: 'merge'"),
        (["export", "run", "out", "--rank", "many"], "argument --rank: invalid int value: 'many'"),
    ],
)
def test_words_that_fit_no_command(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# The commands on a tiny run


def test_train_prints_its_results_as_json(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The options stand between the words, and progress goes to stderr."""
    words = ["train", str(recipe), "--json", f"output={tmp_path / 'run'}", "evaluation.generate=false"]
    assert main(words) == 0
    result, err = said(capsys)
    assert result == json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in result["rows"]] == ["random", "popularity", "base model", "sft", "softmax-DPO"]
    assert "sft: 4/4 steps, loss" in err
    assert f"report: {tmp_path / 'run' / 'report.html'}" in err
    assert main([*words, "--resume"]) == 0
    assert said(capsys)[0]["rows"] == result["rows"]


def test_train_shows_the_table_without_json(runs: list[Path], recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), f"output={runs[0]}", "seed=0", "--resume"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "softmax-DPO" in out and "HR@1" in out


def test_prepare_writes_rows_for_any_trainer(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(recipe), str(tmp_path / "rows"), "--json", "data.negatives=2"]) == 2
    assert "stages.1.negatives 3 is more than" in capsys.readouterr().err
    assert main(["prepare", str(recipe), str(tmp_path / "rows"), "--json"]) == 0
    result, err = said(capsys)
    assert result["folder"] == str(tmp_path / "rows")
    assert result["counts"]["train rows"] == 32
    assert f"rows: {tmp_path / 'rows'}" in err
    rows = [json.loads(line) for line in (tmp_path / "rows" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 32
    assert all(isinstance(row["prompt"], str) and row["chosen"] and len(row["rejected"]) == 3 for row in rows)


def test_evaluate_measures_again(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    trained = json.loads((runs[0] / "results.json").read_text(encoding="utf-8"))["rows"][-1]["metrics"]
    assert main(["evaluate", str(runs[0]), "--json"]) == 0
    result, _ = said(capsys)
    assert result["rows"][-1]["metrics"] == pytest.approx(trained, abs=1e-6)
    assert main(["evaluate", str(runs[0]), "--json", "evaluation.split=validation", "evaluation.cases=3"]) == 0
    assert {row["cases"] for row in said(capsys)[0]["rows"]} == {3}


def test_recommend_to_one_and_to_all(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(runs[0])
    assert main(["recommend", run, "--user", "u1", "--top", "3", "--json"]) == 0
    of_user, err = said(capsys)
    titles = [one["title"] for one in of_user["recommendations"]]
    assert len(titles) == 3 and not set(titles) & set(of_user["history"]) and of_user["exact"]
    assert titles[0] in err
    assert main(["recommend", run, "--history", *of_user["history"], "--top", "3", "--json"]) == 0
    assert said(capsys)[0]["recommendations"] == of_user["recommendations"]
    assert main(["recommend", run, "--user", "u1", "--candidates", *titles[::-1], "--json"]) == 0
    assert [one["title"] for one in said(capsys)[0]["recommendations"]] == titles

    (tmp_path / "users.txt").write_text("u1\nu2\n\nu1\n", encoding="utf-8")
    for users, count in (([], 16), (["--users", str(tmp_path / "users.txt")], 2)):
        out = tmp_path / f"all-{count}"
        assert main(["recommend", run, "--out", str(out), *users, "--top", "3", "--json"]) == 0
        assert said(capsys)[0] == {"folder": str(out), "users": count}
        table = pl.read_parquet(out / "part-*.parquet")
        assert table.height == 3 * count
        assert table.filter(user="u1")["title"].to_list() == titles

    other = shutil.copytree(run, tmp_path / "run")
    words = ["recommend", str(other), "--out", str(tmp_path / "of-other")]
    assert main(words) == 0 and main(words) == 0
    manifest = next(other.glob("stages/*/manifest.json"))
    manifest.write_text(manifest.read_text() + " ")  # as if another training had the same path
    assert main(words) == 2
    assert "holds recommendations of other users or settings" in capsys.readouterr().err


def test_export_and_inspect(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(runs[0]), str(tmp_path / "small"), "--rank", "2", "--stage", "sft", "--json"]) == 0
    report, err = said(capsys)
    assert set(report) == {"ranks", "relative_error", "parameters", "module_errors"}
    assert "relative error" in err
    assert main(["inspect", str(tmp_path / "small"), "--json"]) == 0
    shown, err = said(capsys)
    assert {row["module"]: row["rank"] for row in shown["modules"]} == dict.fromkeys(report["ranks"], 2)
    assert sum(row["parameters"] for row in shown["modules"]) == report["parameters"]
    assert sum(kind["parameters"] for kind in shown["kinds"]) == report["parameters"]
    assert [len(row) for row in shown["grid"]["ranks"]] == [7, 7] and shown["grid"]["layers"] == ["layer 0", "layer 1"]
    assert "14 modules" in err and "Live directions by layer and kind of module" in err


def test_report_of_one_run_and_of_several(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    (runs[0] / "report.html").unlink()
    assert main(["report", str(runs[0]), "--json"]) == 0
    assert said(capsys)[0] == {"report": str(runs[0] / "report.html")}
    assert (runs[0] / "report.html").is_file()
    assert main(["report", str(runs[0]), "--json", str(runs[1])]) == 0
    rows = {row["name"]: row for row in said(capsys)[0]["rows"]}
    single = [json.loads((run / "results.json").read_text(encoding="utf-8"))["rows"][-1]["metrics"] for run in runs]
    mean = sum(one["MRR"] for one in single) / 2
    assert rows["softmax-DPO"]["metrics"]["MRR"]["mean"] == pytest.approx(mean)
    assert main(["report", *map(str, runs), "--markdown"]) == 0
    assert "| --- |" in capsys.readouterr().out


# Mistakes and failures


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "no/recipe.yaml"], "recipe no/recipe.yaml does not exist"),
        (["train", "RECIPE", "stages.0.epoch=2"], "stages.0.epoch is unknown: did you mean 'epochs'?"),
        (["train", "RECIPE", "seed"], "override 'seed' has no '='"),
        (["train", "RECIPE", "data.items=no/items.csv"], "data.items no/items.csv does not exist"),
        (["train", "RECIPE", "output=DONE", "seed=0"], "holds this run, finished: give another folder"),
        (["train", "RECIPE", "output=DONE", "seed=7"], "holds another run: give another folder"),
        (["prepare", "RECIPE", "DONE"], "already there and not empty"),
        (["evaluate", "no/run"], "has no recipe.yaml: give the folder of a finished `rankwise train`"),
        (["export", "no/run", "out"], "has no recipe.yaml and no adapter_config.json: give the folder of a finished"),
        (["export", "DONE", "OUT", "--model", "embedded"], "the base of a run is in its recipe"),
        (["export", "DONE/adapter", "OUT", "--stage", "sft"], "stage 'sft' is of a run, and"),
        (["init", "embedded", "--out", "OUT", "--rank", "0"], "--rank 0 is not possible: it must be 1 or more"),
        (["export", "DONE", "OUT", "--energy", "1.5"], "energy 1.5 is not possible"),
        (["export", "DONE", "OUT", "--rank", "0"], "rank 0 is not possible"),
        (["export", "DONE/adapter", "OUT", "--layout", "own", "--rank", "2"], "layout 'own' holds the whole update"),
        (["export", "DONE", "DONE"], "holds something other than an earlier export"),
        (["export", "DONE", "RECIPE/below"], "recipe.yaml/below cannot be written"),
        (["train", "RECIPE", "output=RECIPE/below"], "recipe.yaml/below cannot be written"),
        (["prepare", "RECIPE", "RECIPE/below"], "recipe.yaml/below cannot be written"),
        (["demo", "--output", "RECIPE/below"], "recipe.yaml/below cannot be written"),
        (["recommend", "DONE", "--out", "RECIPE/below"], "recipe.yaml/below cannot be written"),
        (["recommend", "DONE", "--user", "u1", "--top", "0"], "--top 0 is not possible: it must be 1 or more"),
        (["recommend", "DONE", "--user", "u1", "--most-nodes", "0"], "--most-nodes 0 is not possible"),
        (["inspect", "no/adapter"], "no/adapter is not a folder"),
        (["recommend", "no/run", "--user", "u1"], "no/run has no recipe.yaml"),
        (["recommend", "DONE", "--user", "nobody"], "user 'nobody' is none of 16 in the log"),
        (["recommend", "DONE", "--history", "No such film"], "'No such film' is none of the"),
        (["recommend", "DONE", "--user", "u1", "--stage", "sftt"], "did you mean 'sft'?"),
        (["recommend", "DONE", "--user", "u1", "--users", "no.txt"], "--users needs --out"),
        (["recommend", "DONE", "--out", "OUT", "--candidates", "a", "b"], "--candidates cannot be with --out"),
        (["recommend", "DONE", "--out", "OUT", "--users", "no.txt"], "--users no.txt cannot be read as text"),
        (["report", "no/run"], "no/run is not a folder"),
        (["report", "DONE", "DONE"], "is given twice"),
        (["demo", "--ratings", "ratings.csv"], "demo needs both --ratings and --items, or neither"),
        (["demo", "--items", "items.csv"], "demo needs both --ratings and --items, or neither"),
        (["demo", "--ratings", "no.csv", "--items", "no.csv"], "data.interactions no.csv does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(
    words: list[str],
    message: str,
    recipe: Path,
    runs: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Told before data and a base are read."""

    def slow(*_: Any, **__: Any) -> None:
        raise AssertionError("slow work was begun")

    for name in ("run.load_task", "evaluation.load_language_model", "adapters.load_base", "recommend.prepare._opened"):
        monkeypatch.setattr(f"rankwise.{name}", slow)
    monkeypatch.chdir(tmp_path)
    for name, path in (("RECIPE", recipe), ("DONE", runs[0]), ("OUT", tmp_path / "out")):
        words = [word.replace(name, str(path)) for word in words]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rankwise: ") and err.count("\n") == 1
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_from_outside(tmp_path: Path) -> None:
    done = python("-m", "rankwise.cli", "train", str(tmp_path / "none.yaml"), "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"rankwise: recipe {tmp_path / 'none.yaml'} does not exist")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "last", "traced"),
    [
        (RuntimeError("out of memory"), 1, "rankwise: failed: RuntimeError: out of memory", True),
        (KeyboardInterrupt(), 1, "rankwise: interrupted", False),
        (UserError("a mistake"), 2, "rankwise: a mistake", False),
    ],
)
def test_failures_have_other_codes(
    error: BaseException,
    code: int,
    last: str,
    traced: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr("rankwise.analysis.ranks.read_adapter", failing)
    assert main(["inspect", "adapter"]) == code
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == last
    assert ("Traceback" in err) == traced


# The demo


@pytest.fixture
def small_demo(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's own recipe, on the small model, with less data and fewer steps; run in an empty folder."""
    values = rankwise.demo._values

    def smaller(*arguments: Any) -> dict[str, Any]:
        made = values(*arguments)
        made["model"] = {"path": str(model_folder)}
        made["data"] |= {"rows": 16, "candidates": 5, "history": 2}
        made["stages"] = [stage | {"epochs": 1} for stage in made["stages"]]
        made["stages"][1:] = [stage | {"rows": 8} for stage in made["stages"][1:]]
        made["evaluation"] = {"cases": 4}
        return made

    def log(folder: Path) -> tuple[Path, Path]:
        return write_synthetic(folder, SyntheticSettings(users=10, interactions=6, series=2, parts=2, singles=3))

    monkeypatch.setattr(rankwise.demo, "_values", smaller)
    monkeypatch.setattr(rankwise.demo, "write_synthetic", log)
    monkeypatch.chdir(tmp_path)


def test_demo_on_its_own_log(small_demo: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--json"]) == 0
    result, err = said(capsys)
    assert [row["name"] for row in result["rows"]][-4:] == ["base model", "sft", "DPO-1", "softmax-DPO-3"]
    assert "synthetic log, made by rankwise's own generator: runs/demo-log" in err
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()
    assert (tmp_path / "runs" / "demo" / "adapter" / "adapter_model.safetensors").is_file()


def test_demo_on_files_of_ones_own(small_demo: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ratings, items = rankwise.demo.write_synthetic(tmp_path / "mine")
    words = ["demo", "--ratings", str(ratings), "--items", str(items), "--output", "films", "--seed", "3", "--json"]
    assert main(words) == 0
    assert len(said(capsys)[0]["rows"]) == 6
    saved = yaml.safe_load((tmp_path / "films" / "recipe.yaml").read_text(encoding="utf-8"))
    assert (saved["seed"], saved["data"]["interactions"]) == (3, str(ratings))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["films", "mine"]
