"""The best titles for a history are those of scoring every title apart; what cannot be ranked is refused or counted."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from conftest import seeded_llama
from rankwise.errors import UserError
from rankwise.files import MANIFEST
from rankwise.recommend.batch import recommend_users
from rankwise.recommend.prepare import InteractionSettings, prepare_interactions
from rankwise.recommend.prompts import load_template
from rankwise.recommend.recommender import Recommender
from rankwise.recommend.store import Store, closest, make_store, read_store, write_store
from rankwise.tokenise import encode_completion, encode_prompt
from rankwise.trees.catalogue import separate_log_probabilities

TITLES = ["fox", "red fox", "red fox 2", "river", "the river", "A model", "a dog", "grey", "film <b>", "naïve"]
USERS = {"1": ["fox", "river"], "2": ["a dog", "grey", "red fox", "film <b>"], "ann": ["naïve"]}


def store(titles: Sequence[str] = TITLES, template: str = "films") -> Store:
    frame = pl.DataFrame({"title": titles})
    return Store(
        frame.with_columns(popularity=pl.lit(1), items=pl.concat_list("i" + frame["title"])),
        pl.DataFrame({"user": list(USERS), "titles": list(USERS.values())}),
        load_template(template),
        most_history=3,
    )


@pytest.fixture(scope="module")
def model(tiny_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return seeded_llama(tiny_tokenizer).double()


@pytest.fixture(scope="module")
def recommender(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Recommender:
    return Recommender(model, tiny_tokenizer, store(), 256)


def scores(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, history: Sequence[str], titles: Sequence[str]
) -> dict[str, float]:
    """Each title read in a sequence of its own."""
    prompt = encode_prompt(tokenizer, load_template("films").render(history), 256)
    answers = [encode_completion(tokenizer, " " + title) for title in titles]
    found = separate_log_probabilities(model, prompt, answers).tolist()
    return dict(zip(titles, found, strict=True))


@settings(max_examples=25, deadline=None)
@given(history=st.lists(st.sampled_from(TITLES), min_size=1, max_size=6), top=st.integers(1, 12), seen=st.booleans())
def test_the_best_are_those_of_scoring_every_title_apart(
    recommender: Recommender,
    model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    history: list[str],
    top: int,
    seen: bool,
) -> None:
    [ranking] = recommender.recommend([history], top, exclude_seen=not seen)
    left = [title for title in TITLES if seen or title not in history]
    expected = scores(model, tiny_tokenizer, history[-3:], left)
    assert ranking.exact
    assert [one.title for one in ranking.best] == sorted(left, key=lambda title: -expected[title])[:top]
    for one in ranking.best:
        assert one.score == pytest.approx(expected[one.title], abs=1e-9)
        assert one.items == ["i" + one.title]


def test_many_histories_are_ranked_as_each_alone(recommender: Recommender) -> None:
    histories = list(USERS.values())
    together = recommender.recommend(histories, 4, length_normalised=True)
    for history, ranking in zip(histories, together, strict=True):
        [alone] = recommender.recommend([history], 4, length_normalised=True)
        assert [one.title for one in alone.best] == [one.title for one in ranking.best]


def test_a_search_that_is_cut_short_says_so(recommender: Recommender) -> None:
    [ranking] = recommender.recommend([["fox"]], 3, most_nodes=1)
    assert not ranking.exact
    assert ranking.read <= 16


def test_candidates_need_not_be_in_the_catalogue(
    recommender: Recommender, model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    candidates = ["river", "a new film", "grey"]
    ranking = recommender.rank(["fox"], candidates, top=2)
    by_mean = recommender.rank(["fox"], candidates, top=10, length_normalised=True)
    lengths = {one: len(encode_completion(recommender._tokenizer, f" {one}")) for one in candidates}
    expected = {one.title: one.score / lengths[one.title] for one in recommender.rank(["fox"], candidates).best}
    assert {one.title: one.score for one in by_mean.best} == pytest.approx(expected)
    assert [one.score for one in by_mean.best] == sorted(expected.values(), reverse=True)
    expected = scores(model, tiny_tokenizer, ["fox"], candidates)
    assert [one.title for one in ranking.best] == sorted(candidates, key=lambda title: -expected[title])[:2]
    assert {one.title: one.items for one in recommender.rank(["fox"], candidates).best}["a new film"] == []


def test_a_template_with_candidates_ranks_only_those(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    listed = Recommender(model, tiny_tokenizer, store(template="films-candidates"), 256)
    with pytest.raises(UserError, match="'films-candidates' list the candidates"):
        listed.recommend([["fox"]])
    assert len(listed.rank(["fox"], ["river", "grey"]).best) == 2


def test_the_oldest_titles_leave_a_prompt_that_is_too_long(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def read(context: int, history: Sequence[str]) -> list[tuple[str, float]]:
        [ranking] = Recommender(model, tiny_tokenizer, store(), context).recommend([history], exclude_seen=False)
        return [(one.title, round(one.score, 9)) for one in ranking.best]

    whole = ["the river", "red fox 2", "fox"]
    least = len(encode_prompt(tiny_tokenizer, load_template("films").render(whole), 256))
    longest = max(len(encode_completion(tiny_tokenizer, " " + title)) for title in TITLES)
    assert read(least + longest, whole) == read(256, whole)
    assert read(least + longest - 1, whole) == read(256, whole[1:])


def test_titles_that_read_alike_are_counted(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    # Of the ten, "fox" begins none (its answer is " fox"), "red fox" begins "red fox 2"; the long one is left out.
    titles = [*TITLES, "x" * 200]
    found = Recommender(model, tiny_tokenizer, store(titles), 256)
    assert found.counts["titles left out as too long"] == 1
    assert found.counts["titles that begin another"] == 1
    assert found.counts["titles with the tokens of another"] == 0
    assert found.titles == TITLES
    lower = copy.deepcopy(tiny_tokenizer)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    alike = Recommender(model, lower, store(["Grey", "grey", "fox"]), 256)
    assert alike.counts["titles with the tokens of another"] == 1
    [ranking] = alike.recommend([["fox"]])
    by_title = {one.title: one.score for one in ranking.best}
    assert by_title["Grey"] == by_title["grey"]


@pytest.mark.parametrize(
    ("history", "options", "message"),
    [
        ([], {}, "a history is empty"),
        (TITLES, {}, "nothing is left to recommend"),
        (["fox"], {"top": 0}, "count is 0"),
        (["fox"], {"most_nodes": 0}, "most_nodes is 0"),
    ],
)
def test_what_cannot_be_ranked(
    recommender: Recommender, history: list[str], options: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        recommender.recommend([history], **options)


@pytest.mark.parametrize("candidates", [[], ["fox"], ["fox", "fox"]])
def test_candidates_that_are_no_choice(recommender: Recommender, candidates: list[str]) -> None:
    with pytest.raises(UserError, match="give 2 or more, each once"):
        recommender.rank(["fox"], candidates)


def test_scores_that_are_no_numbers(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    broken = seeded_llama(tiny_tokenizer)
    torch.nn.init.constant_(broken.model.norm.weight, float("nan"))
    found = Recommender(broken, tiny_tokenizer, store(), 256)
    with pytest.raises(UserError, match="scores are NaN"):
        found.recommend([["fox"]])
    with pytest.raises(UserError, match="scores are NaN"):
        found.rank(["fox"], ["river", "grey"])


def test_no_title_fits(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"none of 10 titles fits half of 2 tokens: raise model\.context"):
        Recommender(model, tiny_tokenizer, store(), 2)


def test_people_are_found_by_name_and_titles_by_what_they_are_called() -> None:
    known = store()
    assert known.history("2") == USERS["2"]
    assert known.find(["RED  fox", "ired fox 2", "a model"]) == ["red fox", "red fox 2", "A model"]
    with pytest.raises(UserError, match=r"user '3' is none of 3 in the log; such as '1', '2', 'ann'"):
        known.history("3")
    with pytest.raises(UserError, match=r"user 'anna' is none of 3 in the log; the closest: 'ann'"):
        known.history("anna")
    with pytest.raises(UserError, match=r"'the rivr' is none of the 10 titles; the closest: 'the river'"):
        known.find(["fox", "the rivr"])


def test_a_store_is_written_and_read(tmp_path: Path) -> None:
    made = store()
    write_store(tmp_path / "store", made)
    found = read_store(tmp_path / "store")
    assert found.titles.equals(made.titles)
    assert found.histories.equals(made.histories)
    assert (found.template, found.most_history) == (made.template, made.most_history)
    (tmp_path / "store" / "titles.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"titles\.parquet is not as it was written"):
        read_store(tmp_path / "store")
    (tmp_path / "store" / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"titles\.parquet is not readable as Parquet .*: run its recipe again"):
        read_store(tmp_path / "store")
    (tmp_path / "store" / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json is not JSON .*: run its recipe again"):
        read_store(tmp_path / "store")
    (tmp_path / "store" / "histories.parquet").unlink()
    with pytest.raises(UserError, match=r"no histories\.parquet: recommendations need a finished run"):
        read_store(tmp_path / "store")
    with pytest.raises(UserError, match=r"no settings\.json: recommendations need a finished run"):
        read_store(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"most_history": -1}, "-1 is no count"),
        ({"most_history": "3"}, "'3' is no count"),
        ({"template": 3}, "no attribute 'items'"),
        ({"titles": lambda table: table.drop("items")}, "there is no column items"),
        ({"titles": lambda table: pl.concat([table, table])}, "a title is missing, or is there twice"),
        ({"histories": lambda table: table.with_columns(user=pl.lit(None, pl.String))}, "a user is missing"),
        ({"histories": lambda table: table.with_columns(pl.lit("a").alias("titles"))}, "there is no column titles of"),
    ],
)
def test_a_store_that_is_none_is_told(tmp_path: Path, damage: dict[str, Any], message: str) -> None:
    write_store(tmp_path / "store", store())
    (tmp_path / "store" / MANIFEST).unlink()
    for name, change in damage.items():
        path = tmp_path / "store" / f"{name}.parquet"
        if callable(change):
            change(pl.read_parquet(path)).write_parquet(path)
        else:
            settings = json.loads((tmp_path / "store" / "settings.json").read_text())
            (tmp_path / "store" / "settings.json").write_text(json.dumps(settings | {name: change}))
    with pytest.raises(UserError, match=rf"store is damaged \(.*{message}.*\): run its recipe again"):
        read_store(tmp_path / "store")


def test_the_store_has_every_item_whether_or_not_it_was_chosen(tmp_path: Path) -> None:
    log = [(user, item, time) for user, chosen in {"u": "abcd", "v": "dcx"}.items() for time, item in enumerate(chosen)]
    pl.DataFrame(log, schema=["user", "item", "time"], orient="row").write_csv(tmp_path / "log.csv")
    listed = {"item": [*"abcdexy"], "title": ["A", "B", "C", "D", "never chosen", "twin", "twin"]}
    pl.DataFrame(listed).write_csv(tmp_path / "items.csv")
    prepared = prepare_interactions(
        InteractionSettings(ratings=tmp_path / "log.csv", items=tmp_path / "items.csv", candidates=2, negatives=1)
    )
    made = make_store(prepared, load_template("films"))
    assert made.titles["title"].to_list() == ["A", "B", "C", "D", "never chosen", "twin"]
    assert made.items["twin"] == ["x", "y"]
    assert made.items["never chosen"] == ["e"]
    assert dict(made.titles.select("title", "popularity").iter_rows()) == {
        "A": 1, "B": 1, "C": 0, "D": 1, "never chosen": 0, "twin": 0,
    }  # fmt: skip
    assert made.history("v") == ["D", "C", "twin"]
    assert made.most_history == 3


def test_many_users_are_written_in_parts_that_are_not_made_twice(
    recommender: Recommender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankwise.recommend.batch.PART", 2)
    folder, options = tmp_path / "out", {"top": 3, "exclude_seen": True}
    assert list(recommend_users(recommender, list(USERS), folder, {}, **options))[-1] == 3
    parts = sorted(folder.glob("part-*.parquet"))
    assert len(parts) == 2
    rows = pl.read_parquet(folder / "part-*.parquet")
    for user, history in USERS.items():
        [ranking] = recommender.recommend([history], 3)
        own = rows.filter(user=user)
        assert own["title"].to_list() == [one.title for one in ranking.best]
        assert own["rank"].to_list() == [1, 2, 3]
    parts[1].unlink()
    before = parts[0].stat().st_mtime_ns
    list(recommend_users(recommender, list(USERS), folder, {}, **options))
    assert parts[0].stat().st_mtime_ns == before
    assert pl.read_parquet(folder / "part-*.parquet").equals(rows)
    with pytest.raises(UserError, match="other users or settings"):
        list(recommend_users(recommender, list(USERS), folder, {}, **(options | {"top": 4})))
    with pytest.raises(UserError, match="holds no recommendations"):
        list(recommend_users(recommender, list(USERS), tmp_path, {}, **options))
    with pytest.raises(UserError, match="user 'nobody' is none of 3"):
        list(recommend_users(recommender, ["nobody"], tmp_path / "new", {}, **options))
    assert not (tmp_path / "new").exists()


def test_of_many_titles_those_are_compared_that_share_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.recommend.store.MOST_COMPARED", 2)
    known = [*(f"Number {number}" for number in range(50)), "The River", "Of Mice"]
    assert closest("the rivr", known)[0] == "The River"
    assert closest("of mise", known)[0] == "Of Mice"
