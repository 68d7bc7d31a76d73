"""Work on two workers of a Ray cluster gives what one process gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

import serving_runs
import small_runs
from rankwise.cli import main
from rankwise.comparing.compare import compare
from rankwise.errors import UserError
from rankwise.recipes import make_comparison
from rankwise.recommend import InteractionSettings, SyntheticSettings, write_interactions, write_synthetic
from rankwise.recommend.cluster import check_cluster, over_cluster
from rankwise.recommending import load_recommender, recommend_to_folder

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'rankwise[cluster]'")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning")


def start(gpus: int) -> None:
    ray.init(num_cpus=2, num_gpus=gpus, include_dashboard=False, log_to_driver=False, logging_level="error")


@pytest.fixture(scope="module", autouse=True)
def workers() -> Iterator[None]:
    start(gpus=0)
    yield
    ray.shutdown()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_log_gives_the_same_rows(tmp_path: Path) -> None:
    ratings, items = write_synthetic(tmp_path, SyntheticSettings(users=60))
    log = pl.read_csv(ratings)
    (tmp_path / "log").mkdir()
    for place, part in enumerate(log.iter_slices(200)):
        part.write_csv(tmp_path / "log" / f"{place}.csv")
    with (tmp_path / "log" / "0.csv").open("a") as file:
        file.write("broken,row\n")
    settings = InteractionSettings(ratings=tmp_path / "log", items=items, training_rows=100, core=3, rows_in_memory=250)
    here = write_interactions(tmp_path / "here", settings)
    there = write_interactions(tmp_path / "there", settings, over_cluster)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    assert here.counts == there.counts
    assert here.counts["unparsable rows"] == 1
    with pytest.raises(UserError, match="core = 900: no user and item"):
        write_interactions(tmp_path / "none", replace(settings, core=900), over_cluster)
    (tmp_path / "log" / "1.csv").write_text("user,item\n1,2\n")
    with pytest.raises(UserError, match=r"1\.csv: no column found for the time"):
        write_interactions(tmp_path / "none", settings, over_cluster)
    assert not (tmp_path / "none").exists()


def test_recommendations_for_many_users_are_the_same(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = serving_runs.small_run(tmp_path, model_folder)
    monkeypatch.setattr("rankwise.recommend.batch.PART", 5)
    recommender = load_recommender(run)
    settings = {"run": str(run), "stage": None}
    found = []
    for cluster in (False, True):
        folder = tmp_path / f"cluster-{cluster}"
        recommend_to_folder(
            recommender, folder, small_runs.silent(), users=None, settings=settings, cluster=cluster, top=3
        )
        found.append({file.name: pl.read_parquet(file) for file in folder.glob("*.parquet")})
    assert len(found[0]) > 2
    assert found[0].keys() == found[1].keys()
    for name, here in found[0].items():
        there = found[1][name]
        assert here.drop("score").equals(there.drop("score"))
        assert here["score"].to_list() == pytest.approx(there["score"].to_list(), abs=1e-5)


def test_without_ray_it_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs Ray: pip install 'rankwise\[cluster\]'"):
        check_cluster()
    assert main(["recommend", "run", "--user", "1", "--cluster"]) != 0
    assert "needs Ray" in capsys.readouterr().err


def test_what_runs_a_model_asks_for_a_gpu_where_there_is_one() -> None:
    def gpus(_: int) -> int:
        return len(ray.get_gpu_ids())

    assert list(over_cluster(gpus, [0, 1], models=True)) == [0, 0]
    ray.shutdown()
    start(gpus=2)  # the number is only said: none need be there
    assert list(over_cluster(gpus, [0, 1], models=True)) == [1, 1]
    assert list(over_cluster(gpus, [0, 1])) == [0, 0]


def test_a_comparison_gives_the_same_figures(tmp_path: Path, model_folder: Path) -> None:
    """Two cells, one a worker, against one process here."""
    data = small_runs.text(tmp_path)
    values = {
        "methods": [{"kind": "lora", "r": 2}, {"kind": "milora", "r": 2}],
        "shared": {"model": {"path": str(model_folder), "context": 64}},
        "tasks": {"text": {"data": data | {"validation": data["train"]}, "stages": [small_runs.SFT]}},
        "learning_rates": [1e-2],
        "seeds": [0],
    }
    found = [
        compare(make_comparison(values | {"output": str(tmp_path / name)}), small_runs.silent(), name == "there")
        for name in ("there", "here")
    ]
    scores = [[row["mean"] for row in results["rows"]] for results in found]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    runs = pl.read_parquet(tmp_path / "there" / "runs.parquet")
    assert runs["failed"].null_count() == len(runs) == 2
