"""Runs in several processes of torchrun: the same as in one, resumed by another number, and one that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import TrainerState, TrainingArguments

import process_runs
import small_runs
from rankwise.analysis.results import read_results
from rankwise.checkpoints.trainer import CheckpointedTrainer
from rankwise.cli import main
from rankwise.errors import UserError
from rankwise.processes import Processes, number_started
from rankwise.recipes import make_recipe
from rankwise.run import VERSIONS, Run
from rankwise.sharing import check_shared_out

SCRIPT = Path(__file__).with_name("process_runs.py")
PROCESSES = Path(__file__).parents[1] / "examples" / "processes"
EVEN = small_runs.SFT | {"epochs": 3, "batch_size": 4}
LONG = EVEN | {"epochs": 8, "group_by_length": True}
CUT = {"kind": "sora", "r": 4, "threshold": 0.02, "gate_lr": 0.05, "shrink_after": 2}
LOGGED = ("loss", "grad_norm", "gates_left", "rewards/margins", "logps/chosen")

# What is trained, beside the kind of data: a name, the kind, and what of the recipe is another.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "milora": ("instructions", {"adapter": {"kind": "milora", "r": 4}, "stages": [EVEN]}),
    "sora that is cut": ("instructions", {"adapter": CUT, "stages": [EVEN | {"epochs": 4}]}),
    "sora with a budget": (
        "instructions",
        {"adapter": {"kind": "sora", "r": 4, "target_ratio": 0.5, "gate_lr": 0.05}, "stages": [EVEN]},
    ),
    "accumulated, clipped": ("instructions", {"stages": [EVEN | {"accumulation": 2, "clip": 0.1}]}),
    "softmax-DPO": (
        "interactions",
        {"stages": [EVEN, small_runs.DPO | {"name": "softmax-DPO", "negatives": 3, "batch_size": 4}]},
    ),
    "dora": ("instructions", {"adapter": {"kind": "lora", "r": 4, "use_dora": True}, "stages": [EVEN]}),
    "adalora": ("instructions", {"adapter": {"kind": "adalora", "r": 2}, "stages": [EVEN | {"epochs": 5}]}),
    "lora+": (
        "instructions",
        {"adapter": {"kind": "lora", "r": 4, "lora_plus_ratio": 16}, "stages": [EVEN | {"learning_rate": 1e-3}]},
    ),
    "vera": ("instructions", {"adapter": {"kind": "vera", "r": 8}, "stages": [EVEN | {"learning_rate": 1e-2}]}),
    "prompt": (
        "instructions",
        {"adapter": {"kind": "prompt", "tokens": 4}, "stages": [EVEN | {"learning_rate": 1e-2}]},
    ),
    "prefix": (
        "instructions",
        {"adapter": {"kind": "prefix", "tokens": 4}, "stages": [EVEN | {"learning_rate": 1e-2}]},
    ),
    "bottleneck": ("instructions", {"adapter": {"kind": "bottleneck", "size": 4}, "stages": [EVEN]}),
    "a class": ("classification", {"adapter": {"kind": "full"}, "stages": [EVEN | {"learning_rate": 1e-3}]}),
}
SHARDED = ("milora", "sora that is cut", "softmax-DPO")
FOUR = "sora that is cut"


def torchrun(processes: int, *words: str) -> list[str]:
    """The command that starts a program of Python so many times."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *words]


def environment() -> dict[str, str]:
    """For processes of tests: a thread each, no network, our tests importable."""
    found = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return found | {"PYTHONPATH": str(SCRIPT.parent)}


def started(processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    """The program, run to its end."""
    return subprocess.run(
        torchrun(processes, *words), capture_output=True, text=True, env=environment(), timeout=300, check=False
    )


def written(folder: Path, values: dict[str, Any]) -> str:
    """A recipe's values in a file."""
    path = folder / f"{Path(values['output']).name}.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return str(path)


def of_even_rows(values: dict[str, Any]) -> dict[str, Any]:
    """The recipe with all rows to train on, which are a multiple of 4."""
    data = values["data"]
    return values | {"data": data | ({"validation": data["train"]} if "train" in data else {})}


def spread(values: dict[str, Any]) -> dict[str, Any]:
    """The recipe with weights that are spread over the processes."""
    return values | {"model": values["model"] | {"shard": True}}


def logged(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in LOGGED if name in line} for line in lines]


def assert_same(run: Path, other: Path) -> None:
    """What two runs logged, measured and wrote, but for rounding."""
    assert [line.keys() for line in logged(run)] == [line.keys() for line in logged(other)]
    for one, two in zip(logged(run), logged(other), strict=True):
        assert two == pytest.approx(one, rel=2e-3, abs=2e-4)
    for one, two in zip(read_results(run)["rows"], read_results(other)["rows"], strict=True):
        assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-3, abs=1e-3)
    if (run / "ranks.json").exists():
        assert ranks(run) == ranks(other)
    assert_same_weights(run / "adapter", other / "adapter")


def ranks(run: Path) -> dict[str, tuple[int, int]]:
    rows = json.loads((run / "ranks.json").read_text())
    return {row["module"]: (row["rank"], row["initial_rank"]) for row in rows}


def assert_same_weights(folder: Path, other: Path) -> None:
    """Of LoRA the products: its factors are known but for signs."""
    file = next(path.name for path in folder.glob("*.safetensors"))
    one, two = load_file(folder / file), load_file(other / file)
    assert one.keys() == two.keys()
    for name, value in one.items():
        if "lora_A" in name:
            left = name.replace("lora_A", "lora_B")
            torch.testing.assert_close(two[left] @ two[name], one[left] @ one[name], atol=1e-4, rtol=1e-3)
        elif "lora_B" not in name:
            torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    from conftest import save_base

    return save_base(tiny_tokenizer, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """All runs of the table in two processes, those that can with spread weights too, and some that are refused."""
    folder = tmp_path_factory.mktemp("runs")
    files = []
    for name, (kind, changes) in RUNS.items():
        values = of_even_rows(small_runs.values(kind, folder / name, base, **changes))
        for way in ("one", "two", *(["spread"] if name in SHARDED else [])):
            made = (spread(values) if way == "spread" else values) | {"output": str(folder / name / way)}
            if way == "one":
                Run(make_recipe(made), small_runs.silent())()
            else:
                files.append(written(folder / name, made))
    kind, changes = RUNS["milora"]
    own = of_even_rows(small_runs.values(kind, folder / "others", base, **changes))
    files.append(written(folder, own | {"output": str(folder / "uneven"), "stages": [EVEN | {"batch_size": 16}]}))
    odd = [EVEN | {"batch_size": 3}]
    files.append(written(folder, own | {"output": str(folder / "undisturbed"), "stages": [LONG]}))
    files.append(written(folder, spread(own) | {"output": str(folder / "start-2"), "starts": True}))
    files.append(written(folder, own | {"output": str(folder / "odd"), "stages": odd, "fails": "give 4, say"}))
    files.append(written(folder, own | {"output": str(folder / "milora" / "one"), "fails": "holds"}))
    done = started(2, str(SCRIPT), *files)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def four(runs: Path, base: Path) -> Path:
    """What four processes do: gates that are cut, and a start with spread weights."""
    kind, changes = RUNS[FOUR]
    values = of_even_rows(small_runs.values(kind, runs / FOUR, base, **changes))
    files = [written(runs, spread(values) | {"output": str(runs / FOUR / "four")})]
    kind, changes = RUNS["milora"]
    values = of_even_rows(small_runs.values(kind, runs / "others", base, **changes))
    files.append(written(runs, spread(values) | {"output": str(runs / "start-4"), "starts": True}))
    done = started(4, str(SCRIPT), *files)
    assert done.returncode == 0, done.stderr[-4000:]
    return runs


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_end_as_one_does(runs: Path, name: str) -> None:
    """Losses, gates, measures, ranks and weights, with the same rows to a step."""
    assert_same(runs / name / "one", runs / name / "two")


@pytest.mark.parametrize("name", SHARDED)
def test_spread_weights_end_as_whole_ones_do(runs: Path, name: str) -> None:
    assert_same(runs / name / "one", runs / name / "spread")


def test_gates_close_alike_in_four_processes(four: Path) -> None:
    assert_same(four / FOUR / "one", four / FOUR / "four")


@pytest.mark.parametrize("number", [2, 4])
def test_a_start_from_spread_weights_is_that_of_whole_ones(four: Path, base: Path, number: int) -> None:
    """MiLoRA's factors, each layer's computed in one of the processes."""
    kind, changes = RUNS["milora"]
    values = small_runs.values(kind, four / f"start-{number}-alone", base, **changes)
    model = process_runs.started_model(make_recipe(values))
    alone = {name: value for name, value in model.named_parameters() if "lora_" in name}
    found = load_file(four / f"start-{number}.safetensors")
    assert found.keys() == alone.keys() and len(found) > 20
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value.detach(), atol=1e-6, rtol=0)


def test_gates_were_cut_in_one_process_while_it_trained(runs: Path) -> None:
    """What the comparison above rests on."""
    left = ranks(runs / "sora that is cut" / "one").values()
    assert 0 < sum(rank for rank, _ in left) < sum(initial for _, initial in left)


def test_the_adapter_of_spread_weights_loads_with_plain_peft(runs: Path, base: Path) -> None:
    for name in SHARDED:
        AutoPeftModelForCausalLM.from_pretrained(runs / name / "spread" / "adapter")


def test_the_settings_of_accelerate_that_ship_start_the_same_training(tmp_path: Path, base: Path, runs: Path) -> None:
    kind, changes = RUNS["milora"]
    values = of_even_rows(small_runs.values(kind, tmp_path / "data", base, **changes)) | {
        "output": str(tmp_path / "two")
    }
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(PROCESSES / "ddp.yaml")]
    command = [*launch, "--num_processes", "2", "-m", "rankwise", "train", written(tmp_path, values)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "two" / VERSIONS).read_text())["processes"] == "2"
    assert_same(runs / "milora" / "one", tmp_path / "two")


def test_the_recipe_of_spread_weights_that_ships_runs(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in ("fox", "river", "dog", "tree")]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows * 5), encoding="utf-8")
    monkeypatch.setenv("RANKWISE_DATA", "data")
    changes = [f"model.path={base}", "model.context=200", f"data.train={tmp_path / 'alpaca.json'}", "adapter.r=4"]
    changes += ["stages.0.batch_size=4", "evaluation.cases=4", f"output={tmp_path / 'run'}"]
    done = started(2, "-m", "rankwise", "train", str(PROCESSES / "sharded.yaml"), *changes)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "run" / VERSIONS).read_text())["processes"] == "2"
    assert read_results(tmp_path / "run")["rows"][-1]["name"] == "sft"
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter")


def test_rows_that_are_seen_twice_are_counted(runs: Path) -> None:
    """24 rows are no multiple of 16."""
    counts = read_results(runs / "uneven")["counts"]
    assert counts["sft: rows seen twice in an epoch, so that its last batch is shared out evenly"] == 8


def cut_off(folder: Path, values: dict[str, Any], processes: int, how: signal.Signals) -> tuple[int, str, float]:
    """The status, the words and the seconds of a training after nine steps: SIGTERM for all, SIGKILL for the last."""
    command = torchrun(processes, "-m", "rankwise", "train", written(folder, values))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    ) as run:
        checkpoints = Path(values["output"]) / "checkpoints" / "sft"
        until = time.monotonic() + 120
        while not any(int(path.name.rpartition("-")[2]) >= 9 for path in checkpoints.glob("checkpoint-*")):
            assert run.poll() is None and time.monotonic() < until, run.communicate()[0][-3000:]
            time.sleep(0.01)
        workers = sorted(psutil.Process(run.pid).children(), key=lambda child: child.environ()["RANK"])
        (workers[-1] if how is signal.SIGKILL else run).send_signal(how)
        began = time.monotonic()
        told = run.communicate(timeout=60)[0]
        return run.returncode, told, time.monotonic() - began


def test_a_process_that_dies_ends_the_others_and_two_go_on_where_four_were(
    tmp_path: Path, base: Path, runs: Path
) -> None:
    kind, changes = RUNS["milora"]
    values = of_even_rows(small_runs.values(kind, tmp_path / "data", base, **changes))
    values = spread(values) | {"stages": [LONG], "checkpoint_seconds": 0, "output": str(tmp_path / "cut")}
    status, told, seconds = cut_off(tmp_path, values, 4, signal.SIGKILL)
    assert status != 0 and seconds < 60
    assert "another process of this training has ended" in told or "stopped by " in told
    assert not (tmp_path / "cut" / "report.html").exists()
    done = started(2, "-m", "rankwise", "train", str(tmp_path / "cut.json"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same(runs / "undisturbed", tmp_path / "cut")


def test_one_goes_on_where_two_were_asked_to_end(tmp_path: Path, base: Path, runs: Path) -> None:
    """AdaLoRA, whose importances and plan are in the checkpoint."""
    kind, changes = RUNS["adalora"]
    values = of_even_rows(small_runs.values(kind, tmp_path / "data", base, **changes))
    values |= {"checkpoint_seconds": 0, "output": str(tmp_path / "cut")}
    status, told, seconds = cut_off(tmp_path, values, 2, signal.SIGTERM)
    assert status != 0 and seconds < 30 and told.count("stopped by SIGTERM") == 1, told
    Run(make_recipe(values), small_runs.silent())()
    assert_same(runs / "adalora" / "one", tmp_path / "cut")


def test_a_command_that_does_not_share_its_work_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["methods"]) == 2
    assert "methods is for one process, and 2 were started" in capsys.readouterr().err


def test_a_number_of_processes_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UserError, match="WORLD_SIZE 'many' is no number of processes"):
        number_started()
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 8 and LOCAL_RANK is not set"):
        number_started()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"kind": "allocating_lora", "r": 2}}, "adapter.kind allocating_lora changes the shapes"),
        ({"stages": [EVEN | {"batch_size": 6}]}, "stages: sft: batch_size 6 is for all processes together"),
        (
            {"stages": [EVEN, small_runs.DPO | {"negatives": 2, "draw": "in-batch"}]},
            "drawn from the other rows of a process, which has 2 of batch_size 8: give a batch_size of 12 or more",
        ),
    ],
)
def test_what_several_processes_cannot_do_is_refused_at_once(
    tmp_path: Path, base: Path, changes: dict[str, Any], message: str
) -> None:
    recipe = small_runs.recipe("preferences", tmp_path, base, **changes)
    processes = Processes()
    check_shared_out(recipe, processes)
    processes.number = 4
    with pytest.raises(UserError, match=message):
        check_shared_out(recipe, processes)


def test_an_order_by_length_is_not_gone_on_with_by_others(tmp_path: Path) -> None:
    trainer = object.__new__(CheckpointedTrainer)
    trainer.args = TrainingArguments(output_dir=str(tmp_path), train_sampling_strategy="group_by_length", use_cpu=True)
    trainer.state = TrainerState(epoch=1.5)
    trainer._check_order(1)
    with pytest.raises(UserError, match=r"4 of the processes .* and 1 would draw others"):
        trainer._check_order(4)
    trainer.state.epoch = 2.0
    trainer._check_order(4)


def test_weights_that_accelerate_would_spread_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"ACCELERATE_USE_DEEPSPEED is set: .* by DeepSpeed, .* model.shard=true"):
        Processes()


def test_one_process_waits_for_nobody() -> None:
    alone = Processes()
    assert (alone.number, alone.is_first) == (1, True)
    alone.wait()
    assert alone.told_by_first(3) == 3 and not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": {"kind": "dora"}}, "model.shard is for adapters of kind lora, milora and sora without use_dora"),
        ({"adapter": {"kind": "full"}}, "not full"),
        ({"export": {"layout": "merged"}}, "export later"),
    ],
)
def test_what_needs_whole_weights_is_refused_beside_spread_ones(
    tmp_path: Path, base: Path, changes: dict[str, Any], message: str
) -> None:
    values = small_runs.values("text", tmp_path, base, **changes)
    with pytest.raises(UserError, match=message):
        make_recipe(values | {"model": values["model"] | {"shard": True}})
