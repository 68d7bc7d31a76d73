"""Summaries and translations with encoder-decoder models."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

import small_runs
from rankwise.errors import UserError
from rankwise.evaluation import evaluate_run
from rankwise.recipes import make_recipe
from rankwise.run import Run
from rankwise.schema import Recipe
from rankwise.tasks.rouge import longest_common, rouge, words
from rankwise.tasks.sequences import UNUSABLE, read_sequences

# ROUGE


def test_rouge_by_hand() -> None:
    found = rouge("The cat sat on the mat.", "the cat was on the mat")
    assert found["ROUGE-1"] == pytest.approx(10 / 12)  # the, cat, on, the, mat
    assert found["ROUGE-2"] == pytest.approx(6 / 10)  # the cat, on the, the mat
    assert found["ROUGE-L"] == pytest.approx(10 / 12)
    assert rouge("a b", "b a") == pytest.approx({"ROUGE-1": 1.0, "ROUGE-2": 0.0, "ROUGE-L": 0.5})
    assert set(rouge("", "a").values()) == {0.0}
    assert set(rouge("a, b c", "A b: c!").values()) == {1.0}
    assert rouge("кот спит", "кот спит")["ROUGE-2"] == 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It's 3.5 kg_or so, naïve café №5 x² ❤\ufe0f 1\ufe0f\u20e3", "it s 3 5 kg or so naïve café 5 x² 1"),
        ("cafe\u0301 noir", "cafe\u0301 noir"),
        ("हिन्दी में लिखो।", "हिन्दी में लिखो"),
        ("ක්\u200dෂණය", "ක්\u200dෂණය"),
        ("שָׁלוֹם עולם", "שָׁלוֹם עולם"),
        ("我喜欢GPT-4。", "我 喜 欢 gpt 4"),
        ("東京タワー・2つ", "東 京 タ ワ ー 2 つ"),
        ("か\u3099", "か\u3099"),
        ("ไม่รู้", "ไ ม่ รู้"),
        ("می\u200cروم", "می روم"),
        ("한국어 문장", "한국어 문장"),
    ],
)
def test_words_of_many_scripts(text: str, found: str) -> None:
    assert words(text) == found.split()


def subsequences(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {found for size in range(len(words) + 1) for found in itertools.combinations(words, size)}


@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7))
def test_the_longest_common_subsequence_is_that_of_all_of_them(one: list[str], other: list[str]) -> None:
    longest = max(map(len, subsequences(one) & subsequences(other)))
    assert longest_common(one, other) == longest_common(other, one) == longest


# Reading


def test_rows_without_a_text_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"long": "a b", "short": "a"}, {"long": "", "short": "a"}, {"long": "c", "short": None}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kept, counts = read_sequences(file, "long", "short", "summarize: ")
    assert (kept, counts) == ([{"source": "summarize: a b", "target": "a"}], {UNUSABLE: 2})
    with pytest.raises(UserError, match="shrt"):
        read_sequences(file, "long", "shrt", "")


# Whole runs


@pytest.fixture(scope="module")
def base(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small T5 with seeded random weights, and the tokenizer."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    ends = {"pad_token_id": tiny_tokenizer.pad_token_id, "eos_token_id": tiny_tokenizer.eos_token_id}
    config = T5Config(
        vocab_size=len(tiny_tokenizer), decoder_start_token_id=ends["pad_token_id"], n_positions=128, **sizes, **ends
    )
    folder = tmp_path_factory.mktemp("t5")
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def recipe(folder: Path, base: Path, adapter: Any, **data: Any) -> Recipe:
    rows = [
        {"source": f"The {colour} {thing} had a name.", "target": f"{colour} {thing}"}
        for colour in small_runs.COLOURS
        for thing in small_runs.THINGS
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return make_recipe(
        {
            "model": {"path": str(base), "context": 64},
            "adapter": adapter,
            "data": {"kind": "sequences", "train": str(file), "validation": str(file), "tokens": 12, **data},
            "stages": [{"kind": "sft", "epochs": 6, "batch_size": 4, "learning_rate": 1e-2}],
            "output": str(folder / "run"),
        }
    )


@pytest.mark.parametrize("adapter", [{"kind": "lora", "r": 4}, "full", {"kind": "prefix", "tokens": 2}])
def test_a_run(adapter: Any, tmp_path: Path, base: Path) -> None:
    before = small_runs.hashes(base)
    results = Run(recipe(tmp_path, base, adapter), small_runs.silent())()
    assert results["columns"] == ["ROUGE-1", "ROUGE-2", "ROUGE-L", "loss", "perplexity"]
    start, trained = (row["metrics"] for row in results["rows"])
    assert trained["loss"] < start["loss"]
    assert small_runs.hashes(base) == before
    again = evaluate_run(tmp_path / "run", [], small_runs.silent())["rows"][-1]["metrics"]
    assert again == pytest.approx(trained, rel=1e-4)
    model = AutoModelForSeq2SeqLM.from_pretrained(base if adapter != "full" else tmp_path / "run" / "adapter")
    if adapter != "full":
        model = PeftModel.from_pretrained(model, tmp_path / "run" / "adapter")
    model.eval()(input_ids=torch.tensor([[5, 6]]), decoder_input_ids=torch.tensor([[1]]))


def test_a_model_that_learnt_by_heart_writes_the_targets(tmp_path: Path, base: Path) -> None:
    wanted = recipe(tmp_path, base, "full", measures=["ROUGE-L", "BLEU", "chrF"])
    stages = [{"kind": "sft", "epochs": 60, "batch_size": 8, "learning_rate": 1e-2}]
    learnt = make_recipe(wanted.model_dump(mode="json") | {"stages": stages})
    trained = Run(learnt, small_runs.silent())()["rows"][-1]["metrics"]
    assert trained["ROUGE-L"] > 0.9
    assert trained["chrF"] > 0.8
    assert 0 <= trained["BLEU"] <= 1.0001


def test_texts_that_are_cut_are_counted(tmp_path: Path, base: Path) -> None:
    wanted = recipe(tmp_path, base, {"kind": "lora", "r": 2}, tokens=2)
    wanted = make_recipe(wanted.model_dump(mode="json") | {"model": {"path": str(base), "context": 5}})
    counts = Run(wanted, small_runs.silent())()["counts"]
    assert counts["training sources cut to the context"] == counts["held-out sources cut to the context"] == 24
    assert counts["held-out targets cut to 2 tokens"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"kind": "softmax_dpo"}]}, "needs data of kind"),
        ({"stages": [{"kind": "sft", "loss": "row"}]}, "loss row: data of kind sequences have no prompt"),
        ({"evaluation": {"texts": {"a": "b"}}}, "evaluation.texts are for language models"),
    ],
)
def test_what_does_not_go_with_it(changes: dict[str, Any], message: str, tmp_path: Path, base: Path) -> None:
    with pytest.raises(UserError, match=message):
        make_recipe(recipe(tmp_path, base, "lora").model_dump(mode="json") | changes)


def test_bleu_without_its_library(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rankwise.tasks.sequences.importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"BLEU need sacrebleu: pip install 'rankwise\[sequences\]'"):
        Run(recipe(tmp_path, base, "lora", measures=["BLEU"]), small_runs.silent())()
