"""One run of `preference_study.py`: train as a Run says, and measure. Called with it as JSON, and with a folder.

It prints its results as the last line, as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from rankwise import MiloraConfig
from rankwise.files import new_folder, write_json
from rankwise.generation import generate_answers
from rankwise.models import load_language_model, load_tokenizer, quiet_libraries
from rankwise.preferences import SoftmaxDPOConfig, SoftmaxDPOTrainer
from rankwise.preferences.negatives import Catalogue
from rankwise.recommend import load_template, popularity_scores, substring_protocol
from rankwise.recommend.ranking import GENERATED, EncodedCase, encode_cases, score_candidates
from rankwise.run import whole_rows
from rankwise.schema import EMBEDDED, ModelSettings
from rankwise.tokenise import AnswerCollator, encode_answers, padding_token, token_ids
from rankwise.training import AnswerTrainer
from rankwise.trees import token_tree
from study_data import Row, Rows, drawn, load, template_of
from study_measures import Scores, differences, metrics, ranks
from study_plan import BASE, POPULARITY, Entry, Run, spec
from timing import peak_memory

CONTEXT = 1024
BATCH_TOKENS = 2048
RANK = 16
BATCH = {"supervised": 32, "more": 16, "preference": 16}
WARMUP, CLIP = 0.1, 1.0
# The course of training: parts of it after which some cases are scored with their answer and 3 others.
COURSE, COURSE_CASES, COURSE_ANSWERS = (0.125, 0.25, 0.5, 0.75), 200, 4
POOL, MINE_EVERY = 50, 4  # of hard negatives


class Diverged(Exception):
    """The loss, or a score, is no number."""


class Cases:
    """Cases of a split, tokenised: the true answer is the first."""

    def __init__(self, rows: Sequence[Row], template: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.rows, self.tokenizer = rows, tokenizer
        answer = load_template(template).render_answer
        self.titles = [[row["target"], *(one for one in row["candidates"] if one != row["target"])] for row in rows]
        texts = [[answer(title) for title in titles] for titles in self.titles]
        self.encoded, _ = encode_cases(tokenizer, [row["prompt"] for row in rows], texts, CONTEXT)
        self.tokens = np.array([len(case.answers[0]) for case in self.encoded])

    def scores(self, model: nn.Module, cases: int | None = None, answers: int | None = None) -> Scores:
        """Log-probability of the answers of the first cases, in nats."""
        picked = [EncodedCase(case.prompt, case.answers[:answers]) for case in self.encoded[:cases]]
        training = model.training
        model.eval()
        found = score_candidates(model, picked, padding_token(self.tokenizer), BATCH_TOKENS)
        model.train(training)
        if not all(np.isfinite(values).all() for values in found):
            raise Diverged("an answer's log-probability is no number")
        return found

    def protocol(self, model: nn.Module) -> Entry:
        """What the papers measure on text that is written freely."""
        model.eval()
        texts = generate_answers(model, self.tokenizer, [case.prompt for case in self.encoded], GENERATED)
        found = substring_protocol(texts, self.titles, [row["target"] for row in self.rows])
        values = {"HR@1 greedy": found.hit_rate, "HR@1 greedy of valid": found.hit_rate_valid}
        return values | {"valid ratio": found.valid_ratio}


class Course(TrainerCallback):
    """Scores some cases while training goes on, and ends it where the loss is no number."""

    def __init__(self, model: nn.Module, cases: Cases, run: Run) -> None:
        self.model, self.cases, self.seconds = model, cases, 0.0
        self.found: dict[str, dict[str, float]] = {}
        self.shares = COURSE if run.split == "validation" else ()

    def on_step_end(self, _: Any, state: Any, __: Any, **___: Any) -> None:
        for share in self.shares:
            if state.global_step == max(1, round(share * state.max_steps)):
                started = time.process_time()
                self.found[str(share)] = course_point(
                    self.cases, self.cases.scores(self.model, COURSE_CASES, COURSE_ANSWERS)
                )
                self.seconds += time.process_time() - started

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if not np.isfinite(logs.get("loss", 0.0)):
            raise Diverged("the loss is no number")


def course_point(cases: Cases, scores: Scores) -> dict[str, float]:
    """Of the cases of the course: nats of the true answer, and its margin over the mean of 3 others."""
    cut = np.array([values[:COURSE_ANSWERS] for values in scores[:COURSE_CASES]])
    return {
        "chosen": round(float(cut[:, 0].mean()), 4),
        "margin": round(float((cut[:, 0] - cut[:, 1:].mean(1)).mean()), 4),
    }


def arguments(run: Run, folder: str, steps: int, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": BATCH[run.kind],
        "per_device_eval_batch_size": 16,
        "learning_rate": run.rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": float(round(WARMUP * steps)),
        "max_grad_norm": CLIP,
        "logging_steps": float(max(1, round(steps / 10))),
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "seed": run.seed,
        "use_cpu": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "report_to": "none",
        **more,
    }


def preference_trainer(run: Run, model: nn.Module, tokenizer: Any, rows: Rows, work: Path, folder: str) -> Trainer:
    picked = drawn(rows.fresh if run.new else rows.seen, run.rows, run.seed)
    listed = [
        {"prompt": row["prompt"], "chosen": row["chosen"], "candidates": row["rejected"], "seen": rows.met[row["user"]]}
        for row in picked
    ]
    if run.source == "candidates":  # drawn by the authors from all answers but the window's own
        listed = [{**row, "seen": []} for row in listed]
    settings = SoftmaxDPOConfig(
        **arguments(run, folder, steps_of(run, run.passes)),
        beta=run.beta,
        max_length=CONTEXT,
        negatives=run.source,
        num_negatives=run.negatives,
        sft_weight=run.sft_weight,
        reference=run.reference,
        reference_cache=None if run.reference == "none" else str(work / "reference"),
        **({"mine_pool": POOL, "mine_every": MINE_EVERY} if run.source == "hard" else {}),
    )
    catalogue = Catalogue(list(rows.catalogue), list(rows.catalogue.values()))
    return SoftmaxDPOTrainer(model, settings, listed, processing_class=tokenizer, catalogue=catalogue)


def supervised_trainer(run: Run, model: nn.Module, tokenizer: Any, rows: Rows, folder: str) -> Trainer:
    source = rows.supervised if run.kind == "supervised" else rows.fresh if run.new else rows.seen
    picked = drawn(source, run.rows, run.seed)
    encoded, _ = encode_answers(
        [{"prompt": row["prompt"], "completion": row["chosen"]} for row in picked], tokenizer, CONTEXT
    )
    passes = run.passes
    if run.kind == "more":
        passes *= preference_tokens(picked, tokenizer, run.negatives) / sum(
            3 * len(row["input_ids"]) for row in encoded
        )
    return AnswerTrainer(
        model=model,
        args=TrainingArguments(**arguments(run, folder, steps_of(run, passes))),
        train_dataset=whole_rows(encoded) if run.loss == "row" else encoded,
        data_collator=AnswerCollator.of(tokenizer),
    )


def preference_tokens(rows: Sequence[Row], tokenizer: Any, negatives: int) -> int:
    """Tokens of forward passes that a preference run computes: a backward pass is two, the reference one more."""
    total = 0
    for row in rows:
        prompt, *answers = token_ids(tokenizer, [row["prompt"], row["chosen"], *row["rejected"][:negatives]])
        total += 4 * len(token_tree(prompt, [[*answer, 0] for answer in answers]))
    return total


def steps_of(run: Run, passes: float) -> int:
    return max(1, round(passes * run.rows / BATCH[run.kind]))


def start_model(run: Run, work: Path) -> Any:
    """The model that the run begins with, with a new adapter where one is trained."""
    path = EMBEDDED if run.start == BASE else str(work / "starts" / run.start)
    model = load_language_model(ModelSettings(path=path, dtype="float32"))
    if run.kind in ("preference", "more") and run.weights == "milora":
        config = MiloraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM", cache=str(work / "milora"))
        model = peft.get_peft_model(model, config)
    return model


def train(run: Run, model: Any, tokenizer: Any, rows: Rows, cases: Cases, work: Path) -> Entry:
    """Train the model in place; returns the course, what was logged, and the cost."""
    course = Course(model, cases, run)
    with tempfile.TemporaryDirectory() as folder:
        if run.kind == "preference":
            trainer = preference_trainer(run, model, tokenizer, rows, work, folder)
        else:
            trainer = supervised_trainer(run, model, tokenizer, rows, folder)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(course)
        started = time.process_time()
        if isinstance(trainer, SoftmaxDPOTrainer):
            trainer.compute_reference()
        before = time.process_time()
        trainer.train()
        after = time.process_time()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    kept = ("loss", "grad_norm", "rewards/accuracies", "rewards/margins", "rewards/chosen", "negatives/effective")
    seconds = {"reference": round(before - started, 1), "training": round(after - before - course.seconds, 1)}
    return {
        "steps": trainer.state.global_step,
        "course": course.found,
        "logged": [{name: round(line[name], 4) for name in kept if name in line} for line in logged],
        "seconds": {**seconds, "course": round(course.seconds, 1)},
    }


def start_scores(run: Run, cases: Cases, model: nn.Module, work: Path) -> Scores:
    """Scores of the model that the run begins with, computed once and kept."""
    path = work / "scores" / f"{run.data}-{run.start}-{'listed' if run.listed else 'free'}-{run.split}.json"
    if path.exists():
        return [np.array(values) for values in json.loads(path.read_text(encoding="utf-8"))]
    found = cases.scores(model)
    write_json(path, [[round(float(value), 5) for value in values] for values in found])
    return found


def popularity(cases: Cases, rows: Rows, template: str) -> Entry:
    """How often each candidate stands in the training windows."""
    answer = load_template(template).render_answer
    titles = [[answer(title) for title in listed] for listed in cases.titles]
    scores = popularity_scores(titles, rows.catalogue)
    kept = ("HR@1", "HR@5", "NDCG@5", "MRR")
    return {"metrics": {name: value for name, value in metrics(scores).items() if name in kept}, "ranks": ranks(scores)}


def run_once(run: Run, work: Path) -> Entry:
    """Train and measure; of a training that broke down the metrics are None. For a process of its own."""
    torch.set_num_threads(1)
    quiet_libraries()
    set_seed(run.seed)
    template, rows = template_of(run.data, run.listed), load(run.data, run.listed, work)
    tokenizer = load_tokenizer(EMBEDDED)
    cases = Cases(getattr(rows, run.split), template, tokenizer)
    entry: Entry = {"run": spec(run), "cases": len(cases.rows)}
    if run.start == POPULARITY:
        return entry | popularity(cases, rows, template)
    model = start_model(run, work)
    before = start_scores(run, cases, model, work)
    if run.kind == "measure":
        entry |= measured(before, cases)
    else:
        try:
            entry |= train(run, model, tokenizer, rows, cases, work)
            entry |= compared(cases.scores(model), before, cases, entry["course"])
        except Diverged as error:
            return entry | {"metrics": None, "error": str(error)}
    if run.kind == "supervised":
        with new_folder(work / "starts" / run.folder) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    if run.split == "test":
        entry["metrics"] |= cases.protocol(model)
    return entry


def compared(after: Scores, before: Scores, cases: Cases, course: dict[str, Any]) -> Entry:
    """What was measured after training, beside what was before."""
    points = {"0": course_point(cases, before), **course, "1": course_point(cases, after)}
    return {**measured(after, cases), "against start": differences(after, before), "course": points}


def measured(scores: Scores, cases: Cases) -> Entry:
    found = metrics(scores)
    found["chosen per token"] = float(sum(values[0] for values in scores) / cases.tokens.sum())
    return {"metrics": found, "ranks": ranks(scores)}


if __name__ == "__main__":
    begun = time.process_time()
    made = run_once(Run(**json.loads(sys.argv[1])), Path(sys.argv[2]))
    made["peak_mib"] = round(peak_memory())
    made.setdefault("seconds", {})["all"] = round(time.process_time() - begun, 1)
    print(json.dumps(made))
