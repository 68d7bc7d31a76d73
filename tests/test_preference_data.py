"""Files of preferences: what is read and dropped, how a model is measured on them, and what recipes refuse."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import small_runs
from rankwise.errors import UserError
from rankwise.run import Run
from rankwise.schema import ModelSettings
from rankwise.tasks.preferences import (
    NO_CHOSEN,
    NO_PROMPT,
    NO_REJECTED,
    PreferenceTask,
    _accuracy,
    read_preferences,
)
from rankwise.tokenise import IGNORED

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ROWS: list[dict[str, Any]] = [
    {"prompt": "Who runs?", "chosen": " The fox.", "rejected": [" The river.", " A name, and another name."]},
    {"prompt": "What has a name?", "chosen": " The river has a name.", "rejected": [" The fox."]},
    {"prompt": "Two and two?", "chosen": " four", "rejected": [" four.", " three", " a small model"]},
]


def said(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(contents)]


CHATS = [
    {"chosen": said(f"Who is {name}?", "A friend."), "rejected": said(f"Who is {name}?", "No one.")}
    for name in ("fox", "dog", "river", "film")
]


def written(folder: Path, rows: list[Any], name: str = "rows.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def task(rows: list[Any], tokenizer: PreTrainedTokenizerFast, context: int = 128) -> PreferenceTask:
    return PreferenceTask(rows, rows, tokenizer, ModelSettings(), context, {}, seed=0)


def test_rows_without_what_they_need_are_dropped_and_counted(tmp_path: Path) -> None:
    whole = {"prompt": "a", "chosen": "b", "rejected": "c"}
    faulty = [
        whole | {"prompt": ""},
        whole | {"chosen": None},
        whole | {"rejected": []},
        whole | {"rejected": ["b"]},
        whole | {"rejected": "b"},
        whole | {"rejected": None},
    ]
    seen = whole | {"rejected": ["b", "c"], "seen": ["d"], "score": 3}
    rows, counts = read_preferences(written(tmp_path, [whole, *faulty, seen, *CHATS, 7]))
    kept = {name: value for name, value in seen.items() if name != "score"}
    assert rows == [whole, kept, *CHATS]
    assert counts == {NO_PROMPT: 1, NO_CHOSEN: 1, NO_REJECTED: 4, "unparsable rows": 1}


def test_a_table_without_a_column_or_a_usable_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no column 'rejected'"):
        read_preferences(written(tmp_path, [{"prompt": "a", "chosen": "b"}]))
    with pytest.raises(UserError, match="holds no row with a prompt, a chosen answer and a rejected one"):
        read_preferences(written(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "b"}]))


def test_measures_are_those_of_separate_sequences(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    right, per_token, nats, tokens = 0, 0, 0.0, 0
    for row in ROWS:
        found = []
        for answer in (row["chosen"], *row["rejected"]):
            prompt = [tiny_tokenizer.bos_token_id, *tiny_tokenizer.encode(row["prompt"])]
            ids = [*tiny_tokenizer.encode(answer), tiny_tokenizer.eos_token_id]
            with torch.no_grad():
                values = tiny_llama(torch.tensor([prompt + ids])).logits.double().log_softmax(-1)[0, len(prompt) - 1 :]
            found.append((sum(float(values[at, token]) for at, token in enumerate(ids)), len(ids)))
        (chosen, length), rejected = found[0], found[1:]
        right += all(chosen > value for value, _ in rejected)
        per_token += all(chosen / length > value / count for value, count in rejected)
        nats, tokens = nats - chosen, tokens + length
    made = task(ROWS, tiny_tokenizer)
    assert made.cases == 3
    tiny_llama.train()
    expected = {"accuracy": right / 3, "accuracy per token": per_token / 3, "loss": nats / tokens}
    assert made.evaluate(tiny_llama).metrics == pytest.approx(expected, rel=1e-5)
    assert tiny_llama.training
    assert made.evaluate_training(tiny_llama, 3, seed=1) == pytest.approx(expected, rel=1e-5)


def test_rewards_are_what_an_adapter_adds_to_the_base(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Of equal rows with their answers exchanged, exactly one is right; the base itself has no rewards."""
    row = {"prompt": "Who runs?", "chosen": " The fox.", "rejected": [" A dog."]}
    exchanged = row | {"chosen": " A dog.", "rejected": [" The fox."]}
    made = task([row, exchanged], tiny_tokenizer)
    model = get_peft_model(tiny_llama, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    found = made.evaluate(model).metrics
    assert list(found) == list(made.columns)
    assert found["reward accuracy"] == 0.5
    rewards = []
    for answer in (" The fox.", " A dog."):
        ids = torch.tensor([tiny_tokenizer(f"<|endoftext|>Who runs?{answer}<|endoftext|>")["input_ids"]])
        start = len(tiny_tokenizer("<|endoftext|>Who runs?")["input_ids"])
        with torch.no_grad():
            total = -model(ids, labels=ids.clone().index_fill_(1, torch.arange(start), -100)).loss
            with model.disable_adapter():
                total = total + model(ids, labels=ids.clone().index_fill_(1, torch.arange(start), -100)).loss
        rewards.append(float(total) * (ids.shape[1] - start))
    better = row if rewards[0] > rewards[1] else exchanged
    assert task([better], tiny_tokenizer).evaluate(model).metrics["reward accuracy"] == 1.0
    with model.disable_adapter():
        assert list(made.evaluate(model).metrics) == list(made.columns[1:])
        assert list(made.evaluate(model).metrics) == list(made.columns[1:])


def test_supervised_rows_are_prompts_with_the_chosen_answer(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = task(ROWS, tiny_tokenizer).sft_rows()
    for row, text in zip(rows, ROWS, strict=True):
        assert tiny_tokenizer.decode(row["input_ids"]) == f"<|endoftext|>{text['prompt']}{text['chosen']}<|endoftext|>"
        learned = [token for token in row["labels"] if token != IGNORED]
        assert tiny_tokenizer.decode(learned) == f"{text['chosen']}<|endoftext|>"


def test_mistakes_are_found_before_training_and_name_the_part(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"training preference row 1 has a prompt of \d+ tokens, of which nothing"):
        task(ROWS, tiny_tokenizer, context=3)
    made = task([ROWS[0] | {"rejected": [" The fox.", " A dog."]}, *ROWS], tiny_tokenizer)
    assert made.counts == {
        "training rejected answers equal to the chosen one": 1,
        "held-out rejected answers equal to the chosen one": 1,
    }


def test_chats_from_the_command_to_an_adapter(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, model_folder: Path
) -> None:
    """One stage without supervised training; the base is its reference, and every held-out answer gains over it."""
    base = tmp_path / "base"
    base.mkdir()
    for file in model_folder.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    data = {"kind": "preferences", "train": str(written(tmp_path, CHATS * 6)), "holdout": 0.25}
    stages = [{"kind": "softmax_dpo", "negatives": 1, "epochs": 10, "batch_size": 3, "learning_rate": 3e-2}]
    adapter = {"kind": "lora", "r": 4}
    recipe = small_runs.recipe("preferences", tmp_path / "run", base, data=data, stages=stages, adapter=adapter)
    results = Run(recipe, small_runs.silent())()
    before, after = (row["metrics"] for row in results["rows"])
    assert "reward accuracy" not in before
    assert after["reward accuracy"] == 1.0
    assert (tmp_path / "run" / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_answers_beyond_the_number_of_negatives_are_counted(model_folder: Path, tmp_path: Path) -> None:
    stages = [{"kind": "softmax_dpo", "negatives": 2, "batch_size": 8}]
    results = Run(small_runs.recipe("preferences", tmp_path, model_folder, stages=stages), small_runs.silent())()
    name = "softmax_dpo: rejected answers beyond the number of negatives, never trained on"
    assert results["counts"][name] == 22  # 24 rows of three, of which 2 rows are held out


@pytest.mark.parametrize("draw", ["uniform", "popularity", "hard"])
def test_there_is_no_catalogue_to_draw_from(model_folder: Path, tmp_path: Path, draw: str) -> None:
    stages = [small_runs.SFT, small_runs.DPO | {"draw": draw}]
    with pytest.raises(UserError, match=f"draw {draw} draws from all titles, which data of kind preferences have not"):
        small_runs.recipe("preferences", tmp_path, model_folder, stages=stages)


def test_scores_that_are_no_number_have_no_accuracy() -> None:
    """No comparison with NaN holds, which would count as a wrong answer."""
    rows = [np.array([2.0, 1.0]), np.array([0.0, 3.0])]
    assert _accuracy(rows) == 0.5
    assert math.isnan(_accuracy([*rows, np.array([1.0, np.nan])]))
