"""What a prompt tells of items and ratings is the same in training, in recommending and in files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import small_runs
from rankwise.cli import main
from rankwise.errors import UserError
from rankwise.recommend import (
    InteractionSettings,
    PublishedSettings,
    SyntheticSettings,
    load_template,
    prepare_interactions,
    prepare_published,
    write_interactions,
    write_synthetic,
)
from rankwise.recommend.recommender import Recommender
from rankwise.recommend.store import make_store, read_store, write_store
from rankwise.tokenise import encode_prompt

TEMPLATE = """
name: rated
description: films with their genres, and how they were rated
prompt: "Seen: {history}. Next:"
separator: "; "
answer: " {title}"
item: "{title} ({genres}, {rating} of 5)"
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> InteractionSettings:
    folder = tmp_path_factory.mktemp("log")
    ratings, items = write_synthetic(folder, SyntheticSettings(users=30))
    (folder / "rated.yaml").write_text(TEMPLATE)
    return InteractionSettings(ratings=ratings, items=items, template=folder / "rated.yaml", history=4)


def test_training_and_recommending_show_the_same(
    settings: InteractionSettings,
    tiny_llama: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    prepared = prepare_interactions(settings)
    log = pl.read_csv(settings.ratings).join(pl.read_csv(settings.items or ""), on="item")
    about = {(str(user), title): (genres, rating) for user, title, genres, rating in
             log.select("user", "title", "genres", "rating").iter_rows()}  # fmt: skip
    for row in prepared.train[:20] + prepared.test[:5]:
        shown = [(title, *about[row["user"], title]) for title in row["history"]]
        told = "; ".join(f"{title} ({genres}, {rating:g} of 5)" for title, genres, rating in shown)
        assert row["prompt"] == f"Seen: {told}. Next:"

    write_store(tmp_path / "store", make_store(prepared, load_template(settings.template)))
    recommender = Recommender(tiny_llama, tiny_tokenizer, read_store(tmp_path / "store"), 2000)
    user, titles = next(prepared.histories.select("user", "titles").iter_rows())
    ratings = recommender.store.ratings(user)
    assert len(ratings) == len(titles)
    shown = [(title, *about[user, title]) for title in titles[-4:]]
    told = "; ".join(f"{title} ({genres}, {rating:g} of 5)" for title, genres, rating in shown)
    assert recommender._prompt(titles, ratings) == encode_prompt(tiny_tokenizer, f"Seen: {told}. Next:", 2000)
    unrated = "; ".join(f"{title} ({genres}, unknown of 5)" for title, genres, _ in shown)
    assert recommender._prompt(titles) == encode_prompt(tiny_tokenizer, f"Seen: {unrated}. Next:", 2000)
    [known], [unknown] = recommender.recommend([titles], 3, ratings=[ratings]), recommender.recommend([titles], 3)
    assert known.best[0].score != unknown.best[0].score


def test_what_is_to_be_told_must_be_there(settings: InteractionSettings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the template tells genres of each item: give a table of items"):
        prepare_interactions(replace(settings, items=None))
    items = pl.read_csv(settings.items or "").drop("genres")
    items.write_csv(tmp_path / "items.csv")
    with pytest.raises(UserError, match="no column 'genres' for the extra column"):
        prepare_interactions(replace(settings, items=tmp_path / "items.csv"))
    ratings = pl.read_csv(settings.ratings)
    some = ratings.with_columns(pl.when(pl.int_range(pl.len()) % 2 == 0).then(pl.col("rating")))
    some.write_csv(tmp_path / "log.csv")
    found = prepare_interactions(replace(settings, ratings=tmp_path / "log.csv"))
    assert found.counts["unparsable rows"] == 0
    assert "unknown of 5" in found.train[0]["prompt"] + found.train[-1]["prompt"] + found.test[0]["prompt"]
    ratings.drop("rating").write_csv(tmp_path / "log.csv")
    with pytest.raises(UserError, match="no column found for the rating"):
        prepare_interactions(replace(settings, ratings=tmp_path / "log.csv"))
    lists = dict.fromkeys(("train", "validation", "test"), tmp_path / "none.json")
    with pytest.raises(UserError, match="template 'rated' tells genres, rating of each item, which published lists"):
        prepare_published(PublishedSettings(**lists, template=settings.template))


def test_rows_are_written_as_messages(settings: InteractionSettings, tmp_path: Path) -> None:
    write_interactions(tmp_path / "plain", settings)
    write_interactions(tmp_path / "chat", replace(settings, messages=True))
    for part in ("train", "validation", "test"):
        plain, chat = (
            [json.loads(line) for line in (tmp_path / name / f"{part}.jsonl").read_text().splitlines()]
            for name in ("plain", "chat")
        )
        for one, other in zip(plain, chat, strict=True):
            assert other["prompt"] == [{"role": "user", "content": one["prompt"]}]
            assert other["chosen"] == [{"role": "assistant", "content": one["target"]}]
            rejected = [[{"role": "assistant", "content": answer.strip()}] for answer in one["rejected"]]
            assert other["rejected"] == rejected
            assert {key: one[key] for key in ("user", "history")} == {key: other[key] for key in ("user", "history")}


def test_a_run_with_chats_trains_and_tells_lengths(
    tiny_tokenizer: PreTrainedTokenizerFast, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in model_folder.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    (base / "chat_template.jinja").write_text(
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    recipe = small_runs.recipe("interactions", tmp_path, base)
    values = recipe.model_dump(mode="json", exclude_none=True)
    values["data"]["chat"] = True
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path)]) == 0
    said = capsys.readouterr().out
    assert "tokens of a training prompt, at most" in said
    assert "tokens of a title, in the middle" in said
    store = read_store(Path(values["output"]) / "store")
    assert store.template.prompt.startswith("<user>I have seen these films")
    assert store.template.answer == "{title}<|endoftext|>"
    assert main(["recommend", str(values["output"]), "--history", store.titles["title"][0], "--top", "2"]) == 0
