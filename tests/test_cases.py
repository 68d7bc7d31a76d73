"""Case by case: the means are the metrics, the intervals hold them, and the full ranking is that of a plain loop."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import small_runs
from rankwise.errors import UserError
from rankwise.recommend.baselines import sequential
from rankwise.recommend.baselines.trained import BASELINES
from rankwise.recommend.cases import intervals, means, metric_names, ranked_cases
from rankwise.recommend.full_ranking import full_ranking
from rankwise.recommend.metrics import ranking_metrics
from rankwise.recommend.prompts import load_template
from rankwise.run import Run
from rankwise.schema import ModelSettings
from rankwise.tasks.load import prepare
from rankwise.tasks.recommendation import RecommendationTask

TITLES = [f"title {number}" for number in range(15)]
POPULARITY = {title: 15 - number for number, title in enumerate(TITLES[:12])}


def some_rows(generator: np.random.Generator, count: int) -> list[dict[str, Any]]:
    rows = []
    for _ in range(count):
        seen = generator.choice(TITLES, size=int(generator.integers(2, 9)), replace=False).tolist()
        rows.append({"target": seen[0], "history": seen[1:], "seen": frozenset(seen)})
    return rows


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 6))
def test_the_full_ranking_is_that_of_a_plain_loop(seed: int, count: int) -> None:
    """Scores without ties, so that scikit-learn's NDCG is the same."""
    generator = np.random.default_rng(seed)
    rows = some_rows(generator, count)
    scores = generator.normal(size=(count, len(TITLES)))
    order = generator.permutation(count).tolist()
    found, cases = full_ranking(rows, TITLES, POPULARITY, ((at, scores[at]) for at in order))
    shown: list[str] = []
    for at, row in enumerate(rows):
        left = [title for title in TITLES if title == row["target"] or title not in row["seen"]]
        ranked = sorted(left, key=lambda title, at=at: -scores[at][TITLES.index(title)])  # type: ignore[misc]
        place = ranked.index(row["target"]) + 1
        assert cases["MRR full"][at] == pytest.approx(1 / place)
        assert cases["HR@10 full"][at] == float(place <= 10)
        relevant = [[float(title == row["target"]) for title in left]]
        values = [[scores[at][TITLES.index(title)] for title in left]]
        assert cases["NDCG@10 full"][at] == pytest.approx(ndcg_score(relevant, values, k=10))
        shown += ranked[:10]
    assert found["coverage@10"] == pytest.approx(len(set(shown)) / len(TITLES))
    total = sum(POPULARITY.values()) + len(TITLES)
    novelty = [-math.log2((POPULARITY.get(title, 0) + 1) / total) for title in shown]
    assert found["novelty@10"] == pytest.approx(np.mean(novelty))
    for name in ("HR@10 full", "NDCG@10 full", "MRR full"):
        assert found[name] == pytest.approx(cases[name].mean())


def test_where_nobody_has_a_popular_history_there_is_no_lift() -> None:
    rows = [{"target": TITLES[0], "history": ["title 14"], "seen": frozenset({TITLES[0], "title 14"})}]
    found, _ = full_ranking(rows, TITLES, POPULARITY, [(0, np.arange(15.0))])
    assert "popularity lift@10" not in found


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_means_of_the_cases_are_the_metrics(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = [generator.integers(0, 4, size=size).astype(float) for size in generator.integers(2, 9, size=12)]
    places = [int(generator.integers(len(one))) for one in scores]
    targets = generator.choice(TITLES, size=12).tolist()
    cases = ranked_cases([f"u{at}" for at in range(12)], targets, scores, places, POPULARITY)
    assert means(cases) == pytest.approx(ranking_metrics(scores, places))
    assert set(cases["group"]) <= {"1 head", "2 middle", "3 tail"}
    for name, (low, high) in intervals(cases).items():
        assert low <= means(cases)[name] <= high


def recommendation(
    folder: Path, tokenizer: PreTrainedTokenizerFast, template: str = "films", context: int = 256, **options: Any
) -> RecommendationTask:
    data = small_runs.recipe("interactions", folder, folder).data
    return RecommendationTask(
        prepare(data, 0),  # type: ignore[arg-type]
        load_template(template),
        tokenizer,
        ModelSettings(),
        context,
        **options,
    )


def test_a_task_ranks_the_catalogue_in_some_of_its_cases(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, tiny_llama: LlamaForCausalLM
) -> None:
    task = recommendation(tmp_path, tiny_tokenizer, catalogue_cases=5)
    for measure in (*task.baselines().values(), lambda: task.evaluate(tiny_llama)):
        found = measure()
        assert found.cases is not None
        assert found.cases.height == task.cases == 16
        assert found.cases["MRR full"].null_count() == 11
        assert found.metrics["MRR full"] == pytest.approx(found.cases["MRR full"].mean())
        assert set(metric_names(found.cases)) <= set(found.metrics) <= set(task.columns)
    every = recommendation(tmp_path, tiny_tokenizer, catalogue_cases=50).evaluate(tiny_llama)
    assert every.cases is not None and found.cases is not None
    known = found.cases.filter(pl.col("MRR full").is_not_null())
    same = every.cases.filter(pl.col("user").is_in(known["user"].to_list()))
    assert same["MRR full"].to_list() == pytest.approx(known["MRR full"].to_list())


def test_titles_too_long_for_the_context_are_left_out(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_llama: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With all cases that have one of them: the catalogue, the candidates and the baselines go without."""
    monkeypatch.setattr(sequential, "EPOCHS", 1)
    before = recommendation(tmp_path, tiny_tokenizer)
    ratings, lengths = small_runs.recipe("interactions", tmp_path, tmp_path).data.interactions, before._answers
    longest = max(map(len, lengths))
    short = [title for title, answer in zip(before._titles, lengths, strict=True) if len(answer) < longest]
    assert Path(ratings).is_file() and len(short) < len(before._titles)
    task = recommendation(
        tmp_path,
        tiny_tokenizer,
        context=2 * longest - 1,
        catalogue_cases=3,
        baselines=["popularity", "item-knn", "gru4rec"],
    )
    assert task._titles == short
    assert task.counts["titles left out as too long"] == len(before._titles) - len(short)
    assert task.counts["evaluation cases left out for such titles"] == before.cases - task.cases > 0
    for measure in (*task.baselines().values(), lambda: task.evaluate(tiny_llama)):
        assert measure().metrics["MRR full"] > 0


def test_scores_that_are_no_numbers_are_told(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tiny_llama: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = recommendation(tmp_path, tiny_tokenizer, catalogue_cases=3)
    monkeypatch.setattr(
        "rankwise.tasks.recommendation.catalogue_scores", lambda *_: [([0], torch.tensor([[math.nan]]))]
    )
    with pytest.raises(UserError, match="the model's scores are NaN"):
        task.evaluate(tiny_llama)
    with torch.no_grad():
        next(tiny_llama.parameters()).fill_(math.nan)
    with pytest.raises(UserError, match="the model's scores are NaN"):
        task.evaluate(tiny_llama)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_baselines_are_measured_as_models_are(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequential, "EPOCHS", 2)
    names = ["random", "popularity", *BASELINES]
    task = recommendation(tmp_path, tiny_tokenizer, catalogue_cases=5, baselines=names, split=split)
    found = {name: measure() for name, measure in task.baselines().items()}
    assert list(found) == names
    assert found["random"].metrics["HR@1"] == pytest.approx(1 / 5)  # five candidates
    for name, one in found.items():
        assert one.cases is not None and one.cases.height == task.cases
        assert one.cases["MRR full"].null_count() == task.cases - 5
        assert name == "random" or one.metrics["MRR"] != found["random"].metrics["MRR"]


def test_a_baseline_without_its_library_is_refused_before_anything_is_trained(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the baseline als needs `implicit`: .*rankwise\[recsys\]"):
        recommendation(tmp_path, tiny_tokenizer, baselines=["sasrec", "als"])


def test_a_run_that_goes_on_fits_no_baseline_again(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small_runs.recipe("interactions", tmp_path, model_folder, evaluation={"baselines": ["item-knn"]})
    first = Run(made, small_runs.silent())()
    monkeypatch.setattr(RecommendationTask, "_baseline", lambda *_: pytest.fail("it was fitted again"))
    again = Run(made, small_runs.silent(), resume=True)()
    assert [row["name"] for row in again["rows"]] == [row["name"] for row in first["rows"]]


def test_prompts_that_tell_the_candidates_cannot_rank_the_catalogue(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=r"evaluation\.catalogue_cases is 5, but the prompts .* tell the candidates"):
        recommendation(tmp_path, tiny_tokenizer, "films-candidates", catalogue_cases=5)


def test_a_run_keeps_its_cases(tmp_path: Path, model_folder: Path) -> None:
    made = small_runs.recipe("interactions", tmp_path, model_folder, evaluation={"catalogue_cases": 3})
    run = Run(made, small_runs.silent())
    results = run()
    for row in results["rows"]:
        cases = pl.read_parquet(run.folder / "cases" / f"{row['name']}.parquet")
        for name, (low, high) in row["intervals"].items():
            assert low <= row["metrics"][name] <= high
            assert row["metrics"][name] == pytest.approx(cases[name].cast(pl.Float64).mean())
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    low, high = results["rows"][0]["intervals"]["MRR"]
    assert "95 % intervals of the means" in page
    assert f"{low:.4f} to {high:.4f}" in page
