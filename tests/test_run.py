from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file

import rankwise.run
import small_runs
from rankwise.analysis.runfolder import read_run
from rankwise.errors import UserError
from rankwise.evaluation import evaluate_run, export_folder
from rankwise.methods import load_stage, save_stage, with_adapter
from rankwise.models import load_language_model
from rankwise.recipes import dump_recipe, load_recipe
from rankwise.run import Run, logs_shown

EXPORT: dict[str, Any] = {"stage": None, "rank": None, "energy": None, "layout": "uniform"}
IDS = torch.tensor([[0, 40, 50, 60, 70, 80, 90, 100], [0, 45, 55, 65, 75, 85, 95, 105]])


class Finished(NamedTuple):
    folder: Path
    results: dict[str, Any]
    logits: torch.Tensor  # of the trained model, before pruning and export
    printed: str


class Kept(Run):
    """A run that keeps what its trained model computes."""

    def _finish(self, model: PeftModel) -> None:
        with torch.no_grad():
            self.logits = model.eval()(input_ids=IDS).logits
        super()._finish(model)


def run(kind: str, folder: Path, base: Path, **changes: Any) -> Finished:
    console = small_runs.silent()
    made = Kept(small_runs.recipe(kind, folder, base, **changes), console)
    results = made()
    return Finished(made.folder, results, made.logits, small_runs.printed(console))


@pytest.fixture(scope="module")
def finished(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """One run of each kind of data."""
    before = small_runs.hashes(model_folder)
    runs = {kind: run(kind, tmp_path_factory.mktemp(kind), model_folder) for kind in small_runs.KINDS}
    assert small_runs.hashes(model_folder) == before
    return runs


def metrics(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {row["name"]: row["metrics"] for row in results["rows"]}


ROWS = {
    "text": ["base model", "sft"],
    "instructions": ["base model", "sft"],
    "maths": ["base model", "sft"],
    "choices": ["base model", "sft", "softmax-DPO"],
    "preferences": ["base model", "sft", "softmax-DPO"],
    "classification": ["most frequent", "base model", "sft"],
    "glue": ["base model", "sft"],
    "interactions": ["random", "popularity", "base model", "sft", "DPO", "softmax-DPO"],
    "sdpo": ["random", "popularity", "base model", "sft", "softmax-DPO"],
}
RANKED = ["HR@1", "HR@5", "NDCG@5", "MRR", "HR@1 greedy", "HR@1 greedy of valid", "valid ratio"]
CHOSEN = ["accuracy", "accuracy written"]
COLUMNS = {
    "text": ["loss", "perplexity"],
    "instructions": ["loss", "perplexity"],
    "maths": ["accuracy", "answered", "loss", "perplexity"],
    "choices": [*CHOSEN, "answered", "loss", *(f"{share} {name}" for name in ("boolq", "piqa") for share in CHOSEN)],
    "preferences": ["reward accuracy", "accuracy", "accuracy per token", "loss"],
    "classification": ["accuracy", "F1"],
    "glue": ["Pearson", "Spearman"],
    "interactions": RANKED,
    "sdpo": RANKED,
}


@pytest.mark.parametrize("kind", small_runs.KINDS)
def test_the_folder_holds_what_is_documented(finished: dict[str, Finished], kind: str) -> None:
    folder, results, _, printed = finished[kind]
    stages = [stage["name"] for stage in yaml.safe_load((folder / "recipe.yaml").read_text())["stages"]]
    assert {path.name for path in folder.iterdir()} == {
        "recipe.yaml",
        "versions.json",
        "metrics.jsonl",
        "stages",
        "results.json",
        "ranks.json",
        "adapter",
        "report.html",
        *(["store", "cases"] if kind in ("interactions", "sdpo") else []),
    }
    assert sorted(path.name for path in (folder / "stages").iterdir()) == sorted(stages)
    saved = (folder / "recipe.yaml").read_text(encoding="utf-8")
    assert dump_recipe(load_recipe(folder / "recipe.yaml")) == saved
    versions = json.loads((folder / "versions.json").read_text())
    assert {"rankwise", "torch", "transformers", "peft", "python", "platform", "device"} <= set(versions)
    assert json.loads((folder / "results.json").read_text()) == results
    assert f"report: {folder / 'report.html'}" in printed
    assert list(dict.fromkeys(line["stage"] for line in read_run(folder).metrics)) == stages


@pytest.mark.parametrize("kind", small_runs.KINDS)
def test_results_of_every_stage_and_baseline(finished: dict[str, Finished], kind: str) -> None:
    results = finished[kind].results
    assert results["columns"] == COLUMNS[kind]
    assert [row["name"] for row in results["rows"]] == ROWS[kind]
    measured = {row["name"]: list(row["metrics"]) for row in results["rows"]}
    assert measured["sft"] == COLUMNS[kind]
    assert measured["base model"] == [name for name in COLUMNS[kind] if name != "reward accuracy"]
    assert len({row["cases"] for row in results["rows"]}) == 1
    assert {"data", "evaluation", "export", *ROWS[kind][ROWS[kind].index("sft") :]} == set(results["seconds"])
    assert results["export"]["layout"] == "uniform"
    assert results["export"]["relative_error"] < 1e-6


@pytest.mark.parametrize("kind", ["text", "instructions"])
def test_training_lowers_the_loss(finished: dict[str, Finished], kind: str) -> None:
    found = metrics(finished[kind].results)
    assert found["sft"]["loss"] < found["base model"]["loss"] - 0.1


def test_training_learns_the_labels(finished: dict[str, Finished]) -> None:
    found = metrics(finished["classification"].results)
    assert found["sft"]["accuracy"] > max(found["base model"]["accuracy"], found["most frequent"]["accuracy"])


# A direction and its gate in a module of the small Llama.
SIZES = {"q_proj": 65, "k_proj": 49, "v_proj": 49, "o_proj": 65, "gate_proj": 97, "up_proj": 97, "down_proj": 97}


def test_ranks_of_the_finished_adapter(finished: dict[str, Finished]) -> None:
    """MiLoRA's update has up to twice its rank; SoRA's pruned layers are smaller than they were."""
    ranks = {kind: json.loads((one.folder / "ranks.json").read_text()) for kind, one in finished.items()}
    assert {row["initial_rank"] for rows in ranks.values() for row in rows} == {4}
    assert {len(rows) for rows in ranks.values()} == {14}
    assert max(row["live"] for row in ranks["text"]) == 8
    assert max(row["live"] for row in ranks["instructions"]) == 4
    counts = finished["classification"].results["counts"]
    live = sum(row["live"] for row in ranks["classification"])
    gates = [line for line in read_run(finished["classification"].folder).metrics if "gates_left" in line]
    assert live == gates[-1]["gates_left"] < 4 * 14 == gates[-1]["gates"]
    assert counts["layers whose adapter was removed"] == sum(row["live"] == 0 for row in ranks["classification"])
    assert counts["adapter parameters at first"] == 4 * sum(
        SIZES[row["module"].rpartition(".")[2]] for row in ranks["classification"]
    )
    assert counts["adapter parameters after pruning"] == gates[-1]["parameters_left"]


SCRIPT = """
import json, sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
torch.set_num_threads(1)
jobs = json.loads(sys.argv[1])
for job in jobs:
    kind = AutoModelForSequenceClassification if job["labels"] else AutoModelForCausalLM
    more = {"num_labels": job["labels"], "pad_token_id": 1} if job["labels"] else {}
    if job["merged"]:
        model = kind.from_pretrained(job["merged"], dtype=torch.float32)
    else:
        model = PeftModel.from_pretrained(kind.from_pretrained(job["base"], dtype=torch.float32, **more),
        job["adapter"])
    with torch.no_grad():
        save_file({"logits": model.eval()(input_ids=torch.tensor(job["ids"])).logits.contiguous()}, job["out"])
assert "rankwise" not in sys.modules
"""


def test_what_is_written_computes_the_same_without_rankwise(
    finished: dict[str, Finished], model_folder: Path, tmp_path: Path
) -> None:
    """In a process that never imports rankwise, on the original base; plain adapters and merged models."""
    jobs = []
    for kind, one in finished.items():
        export_folder(one.folder, tmp_path / kind, small_runs.silent(), **EXPORT | {"layout": "merged"})
        job = {"labels": {"classification": 2, "glue": 1}.get(kind, 0), "base": str(model_folder), "ids": IDS.tolist()}
        adapter, merged = str(one.folder / "adapter"), str(tmp_path / kind)
        jobs += [
            job | {"adapter": adapter, "merged": "", "out": str(tmp_path / f"{kind}-adapter.safetensors")},
            job | {"adapter": "", "merged": merged, "out": str(tmp_path / f"{kind}-merged.safetensors")},
        ]
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(jobs)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for kind, one in finished.items():
        for form in ("adapter", "merged"):
            found = load_file(tmp_path / f"{kind}-{form}.safetensors")["logits"]
            torch.testing.assert_close(found, one.logits, atol=1e-4, rtol=0, msg=f"{kind}, {form}")


@pytest.mark.parametrize("kind", ["instructions", "classification", "interactions"])
def test_the_same_seed_gives_the_same_results(
    finished: dict[str, Finished], model_folder: Path, tmp_path: Path, kind: str
) -> None:
    """Whatever was drawn before: a new adapter, its gates and a new head come from the recipe's seed."""
    torch.manual_seed(12345)
    again = run(kind, tmp_path, model_folder)
    assert metrics(again.results) == metrics(finished[kind].results)
    assert torch.equal(again.logits, finished[kind].logits)


def test_another_seed_gives_another_adapter(finished: dict[str, Finished], model_folder: Path, tmp_path: Path) -> None:
    other = run("instructions", tmp_path, model_folder, seed=1)
    assert not torch.equal(other.logits, finished["instructions"].logits)


def test_a_stage_starts_from_the_one_it_names(finished: dict[str, Finished]) -> None:
    """softmax-DPO after DPO starts from sft: its first loss is log 4, that of a policy equal to its reference."""
    lines = [line for line in read_run(finished["interactions"].folder).metrics if "loss" in line]
    first = {stage: next(line for line in lines if line["stage"] == stage) for stage in ("DPO", "softmax-DPO")}
    assert first["DPO"]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert first["softmax-DPO"]["loss"] == pytest.approx(1.3862944, abs=1e-5)
    chosen = [line["logps/chosen"] for line in first.values()]
    assert chosen[0] == pytest.approx(chosen[1], abs=1e-4)


def test_evaluating_again_gives_the_same_metrics(finished: dict[str, Finished]) -> None:
    """The last stage as it was saved, against the model that was measured while training."""
    for kind in ("classification", "interactions"):
        console = small_runs.silent()
        again = evaluate_run(finished[kind].folder, (), console)
        last = finished[kind].results["rows"][-1]
        assert again["rows"][-1]["name"] == last["name"]
        assert again["rows"][-1]["metrics"] == pytest.approx(last["metrics"], abs=1e-6)
        assert json.loads((finished[kind].folder / "evaluation.json").read_text()) == again
        (finished[kind].folder / "evaluation.json").unlink()


def test_a_run_can_end_in_a_merged_model(model_folder: Path, tmp_path: Path) -> None:
    made = run("instructions", tmp_path, model_folder, export={"layout": "merged"})
    assert (made.folder / "adapter" / "config.json").is_file()
    assert not (made.folder / "ranks.json").exists()
    again = evaluate_run(made.folder, ("evaluation.base=false",), small_runs.silent())
    assert again["rows"][-1]["metrics"] == pytest.approx(metrics(made.results)["sft"], abs=1e-4)


def test_another_part_of_the_data_can_be_measured(finished: dict[str, Finished]) -> None:
    folder = finished["sdpo"].folder
    again = evaluate_run(folder, ("evaluation.split=validation", "evaluation.generate=false"), small_runs.silent())
    assert {row["cases"] for row in again["rows"]} == {4}
    assert again["columns"] == RANKED[:4]
    (folder / "evaluation.json").unlink()


def test_an_earlier_stage_can_be_exported_smaller(finished: dict[str, Finished], tmp_path: Path) -> None:
    folder = finished["interactions"].folder
    settings = EXPORT | {"stage": "sft", "rank": 2}
    report = export_folder(folder, tmp_path / "small", small_runs.silent(), **settings)
    assert max(report["ranks"].values()) == 2
    assert 0 < report["relative_error"] < 1
    with pytest.raises(UserError, match=r"stage 'sftt' is not in .*: did you mean 'sft'\?"):
        export_folder(folder, tmp_path / "none", small_runs.silent(), **settings | {"stage": "sftt"})
    with pytest.raises(UserError, match=r"has no recipe.yaml and no adapter_config.json: give the folder"):
        export_folder(tmp_path, tmp_path / "none", small_runs.silent(), **settings)


def test_slow_starts_say_how_far_they_are(tmp_path: Path, model_folder: Path) -> None:
    console = Console(record=True, width=100, file=io.StringIO())
    logger, base = logging.getLogger("rankwise.peft_bridge.tuner"), logging.getLogger("rankwise").level
    with logs_shown(console, seconds=0.0):
        logger.info("adapter default: 3 of 9 modules started")
    with logs_shown(console, seconds=60.0):
        logger.info("adapter default: 4 of 9 modules started")
    logger.info("adapter default: 5 of 9 modules started")
    assert console.export_text().strip() == "adapter default: 3 of 9 modules started"
    assert logging.getLogger("rankwise").level == base


# Stopped and resumed


def crash_in(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = rankwise.run.train_stage

    def crashing(model: PeftModel, tokenizer: Any, settings: Any, rows: Any, **more: Any) -> dict[str, int]:
        done = exact(model, tokenizer, settings, rows, **more)
        if settings.name == stage:
            raise RuntimeError("the lights went out")
        return done

    monkeypatch.setattr(rankwise.run, "train_stage", crashing)


@pytest.mark.parametrize("stage", ["DPO", "softmax-DPO"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    finished: dict[str, Finished], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    recipe = small_runs.recipe("interactions", tmp_path, model_folder)
    with monkeypatch.context() as patch:
        crash_in(stage, patch)
        with pytest.raises(RuntimeError, match="the lights went out"):
            Run(recipe, small_runs.silent())()
    folder = Path(recipe.output)
    saved = small_runs.hashes(folder / "stages")
    assert {Path(name).parts[0] for name in saved} == {"sft"} | ({"DPO"} if stage != "DPO" else set())
    assert load_file(folder / "stages" / "sft" / "adapter_model.safetensors")
    assert [line["stage"] for line in read_run(folder).metrics][-1] == stage
    resumed = Kept(recipe, small_runs.silent(), resume=True)
    results = resumed()
    whole = finished["interactions"]
    assert results["rows"] == whole.results["rows"]
    assert results["counts"] == whole.results["counts"]
    assert torch.equal(resumed.logits, whole.logits)
    assert {name: value for name, value in small_runs.hashes(folder / "stages").items() if name in saved} == saved
    numbers = [(line["stage"], line["step"], line.get("loss")) for line in read_run(folder).metrics]
    assert numbers == [(line["stage"], line["step"], line.get("loss")) for line in read_run(whole.folder).metrics]


def test_a_finished_run_can_be_finished_again(finished: dict[str, Finished], model_folder: Path) -> None:
    """Nothing is trained; the adapter and the report are written once more."""
    folder = finished["text"].folder
    before = small_runs.hashes(folder / "adapter")
    recipe = load_recipe(folder / "recipe.yaml")
    (folder / "report.html").unlink()
    results = Run(recipe, small_runs.silent(), resume=True)()
    assert results["rows"] == finished["text"].results["rows"]
    assert small_runs.hashes(folder / "adapter")["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    assert (folder / "report.html").is_file()


def test_resuming_needs_the_same_recipe(finished: dict[str, Finished]) -> None:
    recipe = load_recipe(finished["text"].folder / "recipe.yaml", ["stages.0.epochs=3"])
    with pytest.raises(UserError, match=r"holds another run: .* goes on with its own recipe\.yaml and no changes"):
        Run(recipe, small_runs.silent(), resume=True)


def test_resuming_where_nothing_is_begins_a_run(model_folder: Path, tmp_path: Path) -> None:
    recipe = small_runs.recipe("text", tmp_path, model_folder)
    assert [row["name"] for row in Run(recipe, small_runs.silent(), resume=True)()["rows"]] == ROWS["text"]


def test_a_crash_while_saving_leaves_the_stage_as_it_was(
    finished: dict[str, Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(self: PeftModel, folder: Path, **_: Any) -> None:
        save_file({"half": torch.zeros(2)}, folder / "adapter_model.safetensors")
        raise OSError("no space left on the device")

    recipe = load_recipe(finished["instructions"].folder / "recipe.yaml")
    model = with_adapter(load_language_model(recipe.model), recipe, "CAUSAL_LM")
    monkeypatch.setattr(PeftModel, "save_pretrained", breaking)
    folder = tmp_path / "stages" / "sft"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"what was there")
    with pytest.raises(OSError, match="no space left"):
        save_stage(model, folder)
    assert [path.name for path in (tmp_path / "stages").iterdir()] == ["sft"]
    assert (folder / "adapter_model.safetensors").read_bytes() == b"what was there"


def test_a_saved_stage_loads_to_the_same_function(finished: dict[str, Finished]) -> None:
    """The last stage of the run into a new adapter of the same recipe."""
    one = finished["interactions"]
    recipe = load_recipe(one.folder / "recipe.yaml")
    model = with_adapter(load_language_model(recipe.model), recipe, "CAUSAL_LM").eval()
    with torch.no_grad():
        base = model(input_ids=IDS).logits
        load_stage(model, one.folder / "stages" / "softmax-DPO")
        assert torch.equal(model(input_ids=IDS).logits, one.logits)
        assert not torch.allclose(base, one.logits, atol=1e-3)


@pytest.mark.parametrize(
    ("adapter", "layout"),
    [
        ({"kind": "milora", "r": 4, "use_dora": True, "use_rslora": True}, "merged"),
        ({"kind": "milora", "r": 4, "part": "principal", "lora_plus_ratio": 4}, "uniform"),
        ({"kind": "sora", "r": 4, "part": "minor", "gate_init": "ones"}, "uniform"),
    ],
    ids=["dora", "lora plus", "gates"],
)
def test_methods_are_combined(model_folder: Path, tmp_path: Path, adapter: dict[str, Any], layout: str) -> None:
    """What is finished computes what the last stage was measured with, loaded from its folder."""
    made = run("instructions", tmp_path, model_folder, adapter=adapter, export={"layout": layout})
    again = evaluate_run(made.folder, ("evaluation.base=false",), small_runs.silent())
    assert again["rows"][-1]["metrics"] == pytest.approx(metrics(made.results)["sft"], abs=1e-4)
    assert metrics(made.results)["sft"] != metrics(made.results)["base model"]
