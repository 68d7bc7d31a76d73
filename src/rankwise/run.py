"""Run a recipe: data, model with adapter, stages, evaluation, export, report."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from transformers import set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rankwise.analysis.drift import drift
from rankwise.analysis.place_tables import PLACES
from rankwise.analysis.places import places_over_all, update_places
from rankwise.analysis.ranks import read_ranks
from rankwise.analysis.report import write_report
from rankwise.analysis.runfolder import CASES
from rankwise.analysis.tables import result_table
from rankwise.checkpoints.resuming import (
    CHECKPOINTS,
    VERSIONS,
    changed_versions,
    checkpoints_of,
    earlier_results,
    forget_after,
    whole_checkpoint,
)
from rankwise.checkpoints.stopping import stopped_by_sigterm
from rankwise.errors import UserError
from rankwise.exporting import export
from rankwise.files import check_folder, new_folder, remove_folder, write_json, write_text
from rankwise.measuring import measured, measured_row, not_numbers, row_line
from rankwise.memory import peak_memory
from rankwise.methods import base_of, load_stage, save_stage, with_adapter
from rankwise.models import context_limit, load_tokenizer, quiet_libraries
from rankwise.optimisation import ALLOCATIONS
from rankwise.peft_bridge import active_adapter, adapted_layers
from rankwise.processes import Processes, loss_of_others_told, share_buffers
from rankwise.progress import logs_shown
from rankwise.ranks import AllGatesClosed, gate_counts, prune
from rankwise.recipes import dump_recipe
from rankwise.recommend.store import STORE, write_store
from rankwise.sampling import sample
from rankwise.saying import say
from rankwise.schema import AdaloraSettings, AnyStage, LoraSettings, Recipe, SoraSettings
from rankwise.sharing import check_shared_out
from rankwise.tasks.files import check_recipe_files, check_same_data, data_digests
from rankwise.tasks.load import held_out_elsewhere, load_task
from rankwise.tasks.task import Task
from rankwise.tokenise import padding_token
from rankwise.training import Rows, check_trackers, train_stage
from rankwise.versions import versions

BASE = "base model"


class Run:
    """One run of a recipe in its folder.

    The folder gets ``recipe.yaml``, ``versions.json``, ``metrics.jsonl``, ``stages/<name>/`` (the adapter after each
    stage), ``results.json``, ``ranks.json``, ``adapter/`` (the finished plain LoRA) and ``report.html``; and, for
    recommendation, ``store/``, its titles and histories, and ``cases/``, what each row of the results is a mean of.

    Started by torchrun or accelerate, several processes do the same side by side, each on its share of a step's rows;
    only the first one writes, and shows something.
    """

    def __init__(self, recipe: Recipe, console: Console, resume: bool = False) -> None:
        """Check everything that can be checked before slow work.

        Args:
            recipe: what to run.
            console: where progress and results are shown.
            resume: whether a run that is finished is gone on with too, to write its adapter and report once more; one
                of the same recipe that is not finished is gone on with in any case.

        Raises:
            UserError: a file is missing, or the output folder holds something else.
        """
        self.processes = Processes()
        self.recipe, self.console = recipe, console if self.processes.is_first else Console(quiet=True)
        check_shared_out(recipe, self.processes)
        self.folder = Path(recipe.output)
        check_recipe_files(recipe)
        check_trackers(recipe.log_to)
        self.tokenizer = load_tokenizer(recipe.model.path)
        self.context = context_limit(recipe.model, self.tokenizer, recipe.virtual_tokens)
        self.again = resume
        self.results = earlier_results(self.folder, recipe, again=resume)

    def __call__(self) -> dict[str, Any]:
        """Run all of it; returns the results, as written to ``results.json``.

        Raises:
            UserError: another process is at it, its data changed since it began, or what the parts of a run refuse.
            Stopped: it was asked to end.
        """
        quiet_libraries()
        alone = self.processes.holding(self.folder)
        with alone, deterministic(self.recipe.deterministic), loss_of_others_told(), stopped_by_sigterm():
            self.results = earlier_results(self.folder, self.recipe, again=self.again)
            self._data = data_digests(self.recipe)
            check_same_data(self.results.get("data", {}), self._data)
            self._changed = changed_versions(self.folder, versions())
            self.processes.wait()  # all have read what is there
            return self._run()

    def _run(self) -> dict[str, Any]:
        with self._timed("data"):
            task = load_task(self.recipe, self.tokenizer, self.context)
            self._texts = held_out_elsewhere(self.recipe, self.tokenizer, self.context)
        done = {row["name"] for row in self.results.get("rows", [])}
        self._trained = done | {self.results.get("trained")}  # the last stage that was, perhaps not measured yet
        self._open(task)
        set_seed(self.recipe.seed)
        base = task.load_model()
        with logs_shown(self.console):
            model = with_adapter(base, self.recipe, task.task_type, self._saved())
        share_buffers(model)
        self.results["parameters"] = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        self._adapted = [name for name, _ in adapted_layers(model, active_adapter(model))]
        for name, measure in task.baselines().items():
            if name not in done:
                self._row(measured_row(name, measure(), task.cases, self._cases))
        if self.recipe.evaluation.base and BASE not in done:
            with base_of(model):
                self._measure(task, model, BASE)
        for name in ("stopped", "not_looked_at"):  # of an earlier run
            self.results.pop(name, None)
        self._stages(task, model, done)
        self._finish(model)
        self.results["peak_memory"] = peak_memory()
        self._look_inside(task, model)
        if self.processes.is_first:
            self._report()
        if "stopped" in self.results:
            raise UserError(f"{self.results['stopped']}; {self.folder} holds what the stage before it left")
        return self.results

    def _saved(self) -> Path | None:
        """What an earlier run left of the first stage, from which this one goes on: finished, or a checkpoint of it."""
        first = self.recipe.stages[0].name
        if first in self._trained:
            return self.folder / "stages" / first
        return self._checkpoint(first)

    def _checkpoint(self, stage: str) -> Path | None:
        """From which a stage goes on; the first process says which, and removes those that are damaged."""
        found = whole_checkpoint(self.folder, stage, self.console) if self.processes.is_first else None
        step = self.processes.told_by_first(-1 if found is None else int(found.name.rpartition("-")[2]))
        if self.processes.is_first or step < 0:
            return found
        found = checkpoints_of(self.folder, stage) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        check_folder(found, whole=True)
        return found

    @property
    def _cases(self) -> Path | None:
        return self.folder / CASES if self.processes.is_first else None

    def _stages(self, task: Task, model: PeftModel, done: set[str]) -> None:
        """Train each stage from the one it starts from, and measure it; what is in the model is ``held``.

        A threshold that closes every gate ends them; what the last finished stage left is then in the model.
        """
        held = last = None
        for stage in self.recipe.stages:
            if stage.name not in done:
                start = stage.start or last
                if start != held:
                    load_stage(model, self.folder / "stages" / str(start))
                try:
                    self._stage(task, model, stage)
                except AllGatesClosed as error:
                    if last is None:
                        raise
                    held, self.results["stopped"] = None, f"stage {stage.name}: {error}"
                    break
                held = stage.name
            last = stage.name
        if held != last:
            load_stage(model, self.folder / "stages" / str(last))
        self._remove(self.folder / CHECKPOINTS)

    def _stage(self, task: Task, model: PeftModel, stage: AnyStage) -> None:
        """Train and save one stage, where an earlier run has not, and measure it."""
        saved = self.folder / "stages" / stage.name
        if stage.name in self._trained:
            load_stage(model, saved)
        else:
            if self.processes.is_first:
                forget_after(self.folder / ALLOCATIONS, stage.name)
            with self._timed(stage.name):
                counts = self._train(task, model, stage)
            self.results["counts"] |= {f"{stage.name}: {name}": count for name, count in counts.items()}
            if self.processes.is_first:
                save_stage(model, saved)
            self._write("results.json", self.results | {"trained": stage.name})
        self._measure(task, model, stage.name)
        self._remove(checkpoints_of(self.folder, stage.name))

    def _remove(self, checkpoints: Path) -> None:
        """Remove checkpoints that no process reads any more; what was written before, all of them see then."""
        self.processes.wait()
        if self.processes.is_first:
            remove_folder(checkpoints)

    def _train(self, task: Task, model: PeftModel, stage: AnyStage) -> dict[str, int]:
        catalogue = None
        if stage.kind == "softmax_dpo":
            rows, catalogue = task.preference_rows(stage.rows)
        else:
            rows = whole_rows(task.sft_rows()) if stage.loss == "row" else task.sft_rows()
        return train_stage(
            model,
            self.tokenizer,
            stage,
            rows,
            adapter=self.recipe.adapter,
            context=self.context,
            folder=self.folder,
            seed=self.recipe.seed,
            bfloat16=self.recipe.precision == "bfloat16",
            console=self.console,
            trainer=task.trainer,
            catalogue=catalogue,
            log_to=self.recipe.log_to,
            every=self.recipe.checkpoint_seconds,
            checkpoint=self._checkpoint(stage.name),
            processes=self.processes,
        )

    def _finish(self, model: PeftModel) -> None:
        """Prune, export, and write the ranks."""
        with self._timed("export"):
            if isinstance(self.recipe.adapter, SoraSettings):
                first = model.peft_config[active_adapter(model)].initial_parameters
                left = prune(model).ranks.values()
                self.results["counts"]["adapter parameters at first"] = first
                self.results["counts"]["adapter parameters after pruning"] = gate_counts(model)["parameters_left"]
                removed = len(self._adapted) - sum(rank > 0 for rank in left)
                self.results["counts"]["layers whose adapter was removed"] = removed
            if not self.processes.is_first:
                return
            wanted = self.recipe.export
            assert wanted.layout is not None  # the recipe was checked
            with new_folder(self.folder / "adapter") as made:
                report = export(model, made, wanted.rank, wanted.energy, wanted.layout)
                self.tokenizer.save_pretrained(made)
        self.results["export"] = {
            "relative_error": report.relative_error,
            "parameters": report.parameters,
            "layout": wanted.layout,
        }
        adapter = self.recipe.adapter
        if isinstance(adapter, LoraSettings) and wanted.layout in ("uniform", "compact"):
            initial = adapter.first_rank if isinstance(adapter, AdaloraSettings) else adapter.r
            write_json(self.folder / "ranks.json", _ranks(self.folder / "adapter", self._adapted, initial))

    def _look_inside(self, task: Task, model: PeftModel) -> None:
        """Where the updates lie, and how far hidden states have drifted, where the recipe asks.

        A look that fails is told, and changes nothing of what was trained and measured.
        """
        wanted = self.recipe.evaluation
        self._write("results.json", self.results)
        looks = {"updates": partial(self._updates, model), "drift": partial(self._drift, task, model)}
        for name, look in looks.items():
            if number := getattr(wanted, name):
                try:
                    with self._timed(name):
                        look(number)
                except (UserError, RuntimeError, ValueError, ArithmeticError) as error:
                    if self.recipe.model.shard and self.processes.number > 1:  # the others would wait for this one
                        raise
                    reason = " ".join(str(error).split())[:300]
                    self.results.setdefault("not_looked_at", {})[name] = reason
                    say(self.console, f"  evaluation.{name} failed: {reason}", dim=True)

    def _updates(self, model: PeftModel, directions: int) -> None:
        places, passed = update_places(model, directions)
        self._write(PLACES, places)
        self.results["updates"] = places_over_all(places)
        self.results["counts"] |= passed

    def _drift(self, task: Task, model: PeftModel, number: int) -> None:
        texts = {"training rows": task.sft_rows(), **self._texts.rows}
        some = {name: sample(rows, number, self.recipe.seed)[0] for name, rows in texts.items()}
        padding = padding_token(self.tokenizer)
        self.results["drift"] = {name: drift(model, rows, padding) for name, rows in some.items()}

    def _report(self) -> None:
        write_json(self.folder / "results.json", self.results)
        self.console.print(result_table(self.results))
        say(self.console, f"report: {write_report(self.folder)}")

    def _open(self, task: Task) -> None:
        """Write what is known before training, so that even a run that fails can be read."""
        if self.processes.is_first:
            write_text(self.folder / "recipe.yaml", dump_recipe(self.recipe))
            write_json(self.folder / VERSIONS, versions() | {"processes": str(self.processes.number)})
            if task.store is not None:
                write_store(self.folder / STORE, task.store)
        columns, counts = [*task.columns, *self._texts.columns], {**task.counts, **self._texts.counts}
        start = {"task": task.kind, "columns": columns, "rows": [], "counts": counts, "labels": task.labels}
        self.results = {"data": self._data, **start, **self.results}
        if self._changed:
            self.results["counts"]["versions that changed while it was unfinished"] = len(self._changed)
        for line in [*(f"{name}: {count}" for name, count in counts.items() if count), *self._changed]:
            say(self.console, f"  {line}", dim=True)
        self._write("results.json", self.results)
        if self.recipe.precision == "bfloat16" and not computes_bfloat16():
            say(self.console, "  this processor has no bfloat16 arithmetic: precision=float32 is many times faster")

    def _measure(self, task: Task, model: PeftModel, name: str) -> None:
        with self._timed("evaluation"):
            row = measured(task, model, name, self.recipe, self._cases, base=name == BASE, texts=self._texts)
        self._row(row)

    def _row(self, row: dict[str, Any]) -> None:
        self.results.pop("trained", None)
        self.results["rows"].append(row)
        self.results["counts"] |= not_numbers(row)
        self._write("results.json", self.results)
        say(self.console, row_line(row))

    def _write(self, name: str, value: Any) -> None:
        if self.processes.is_first:
            write_json(self.folder / name, value)

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds = self.results.setdefault("seconds", {})
        seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - started, 2)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Torch takes no algorithm whose result differs from run to run while the block runs, and fails where none is left.

    cuBLAS reads its setting when it is first used: a program that used it before sets ``CUBLAS_WORKSPACE_CONFIG``.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def whole_rows(rows: Rows) -> Rows:
    """The same rows with the loss on every token after the first."""
    return [{**row, "labels": row["input_ids"]} for row in rows]


def computes_bfloat16() -> bool:
    """Whether products of bfloat16 are computed as such; a processor that cannot takes tens of times as long."""
    return torch.cuda.is_available() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _ranks(adapter: Path, adapted: list[str], initial: int) -> list[dict[str, Any]]:
    """Directions of each adapted module in the finished adapter, 0 where it has none left, beside the recipe's rank.

    An update of MiLoRA has up to twice as many directions as its rank.
    """
    written = {row["module"]: row for row in read_ranks(adapter)}
    none = {"live": 0, "parameters": 0, "bytes": 0, "rank": 0}
    rows = [{"module": name, **none, **written.get(name, {}), "initial_rank": initial} for name in adapted]
    return [row | {"rank": row["live"], "stored_rank": row["rank"]} for row in rows]
