"""Which rejected answers the trainer gives rows while it trains."""

from __future__ import annotations

import copy
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import normalizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import rankwise as rw
from rankwise.errors import UserError
from rankwise.preferences.drawing import ALIKE, ALONE
from rankwise.preferences.negatives import Catalogue
from rankwise.preferences.rows import PreferenceRow
from test_preference_training import logged, settings, weights

ANSWERS = ["?", "@", "%", "+", "*", "=", "&", "$", "?@", "%+"]
ROWS: list[dict[str, Any]] = [
    {"prompt": "#" * number, "chosen": ANSWERS[number], "seen": [ANSWERS[9 - number]], "candidates": ANSWERS[:8]}
    for number in range(1, 5)
]


@pytest.fixture
def adapted(tiny_llama: LlamaForCausalLM) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama, config)


class Watched(rw.SoftmaxDPOTrainer):
    """Keeps the texts of every row that is trained on."""

    def _losses(self, model: Any, rows: Any) -> Any:
        self.trained = getattr(self, "trained", [])
        made = self._batch

        def keep(given: list[PreferenceRow]) -> Any:
            if self.model.training:
                self.trained += [row.texts for row in given]
            return made(given)

        self._batch = keep
        try:
            return super()._losses(model, rows)
        finally:
            self._batch = made


def train(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, resume: Any = None, **changes: Any) -> Watched:
    catalogue = Catalogue(ANSWERS, popularity=[8.0, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    arguments = rw.SoftmaxDPOConfig(**settings(folder, **{"max_steps": 4, "per_device_train_batch_size": 2} | changes))
    made = Watched(model, arguments, ROWS, processing_class=tokenizer, catalogue=catalogue)
    made.train(resume_from_checkpoint=resume)
    return made


@pytest.mark.parametrize("kind", ["candidates", "uniform", "popularity", "hard"])
def test_drawn_answers_are_distinct_new_in_each_pass_and_never_chosen_or_seen(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: Any
) -> None:
    made = train(adapted, tiny_tokenizer, tmp_path, negatives=kind, num_negatives=3)
    assert len(made.trained) == 8
    for chosen, *rejected in made.trained:
        seen = next(row["seen"] for row in ROWS if row["chosen"] == chosen)
        assert len(set(rejected)) == 3
        assert not set(rejected) & {chosen, *seen}
    passes = [sorted(made.trained[:4]), sorted(made.trained[4:])]
    assert [texts[0] for texts in passes[0]] == [texts[0] for texts in passes[1]]
    if kind != "hard":
        assert passes[0] != passes[1]


def test_in_batch_answers_are_the_chosen_ones_of_the_other_rows(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    changes = {"negatives": "in-batch", "num_negatives": 3, "per_device_train_batch_size": 4, "max_steps": 1}
    made = train(adapted, tiny_tokenizer, tmp_path, **changes)
    everything = {row["chosen"] for row in ROWS}
    for chosen, *rejected in made.trained:
        seen = next(row["seen"] for row in ROWS if row["chosen"] == chosen)
        assert set(rejected) == everything - {chosen, *seen}


def test_hard_answers_are_those_that_the_model_finds_most_likely(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """At a learning rate of 0 the model that mines is the one at hand."""
    made = train(adapted, tiny_tokenizer, tmp_path, negatives="hard", num_negatives=2, learning_rate=0.0, mine_every=2)
    adapted.eval()
    for row in ROWS:
        scores = {}
        for text in ANSWERS:
            ids = tiny_tokenizer(f"{tiny_tokenizer.bos_token}{row['prompt']}")["input_ids"]
            answer = [*tiny_tokenizer(text)["input_ids"], tiny_tokenizer.eos_token_id]
            with torch.no_grad():
                logs = adapted(input_ids=torch.tensor([ids + answer])).logits[0].log_softmax(-1)
            scores[text] = sum(float(logs[len(ids) - 1 + place, token]) for place, token in enumerate(answer))
        wrong = [text for text in ANSWERS if text not in (row["chosen"], *row["seen"])]
        best = sorted(wrong, key=lambda text: -scores[text])[:2]
        assert all(texts[1:] == best for texts in made.trained if texts[0] == row["chosen"])


def test_the_number_of_negatives_grows_in_stages(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    made = train(adapted, tiny_tokenizer, tmp_path, negatives="candidates", negative_stages=[1, 3], max_steps=4)
    assert [len(texts) - 1 for texts in made.trained] == [1] * 4 + [3] * 4


@pytest.mark.parametrize("kind", ["candidates", "popularity"])
def test_the_reference_of_drawn_answers_is_the_start(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: Any
) -> None:
    """Known before training or computed step by step: the same rewards as against a copy of the model at the start."""
    start = copy.deepcopy(adapted)
    made = train(adapted, tiny_tokenizer, tmp_path, negatives=kind, num_negatives=3)
    other = copy.deepcopy(start)
    arguments = rw.SoftmaxDPOConfig(
        **settings(tmp_path, max_steps=4, per_device_train_batch_size=2, negatives=kind, num_negatives=3)
    )
    catalogue = Catalogue(ANSWERS, popularity=[8.0, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    against = Watched(
        other, arguments, ROWS, processing_class=tiny_tokenizer, catalogue=catalogue, ref_model=start.eval()
    )
    against.train()
    assert against.trained == made.trained
    assert logged(made) == pytest.approx(logged(against), abs=1e-5)
    assert abs(logged(made, "rewards/margins")[-1]) > 1e-3


@pytest.mark.parametrize(
    "drawn",
    [
        {"negatives": "uniform", "num_negatives": 3},
        {"negatives": "hard", "num_negatives": 2, "mine_every": 2, "learning_rate": 0.3},
        {"negatives": "hard", "num_negatives": 2, "mine_every": 2, "mine_pool": 4, "learning_rate": 0.3},
    ],
)
def test_draws_go_on_where_a_training_was_stopped(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, drawn: dict[str, Any]
) -> None:
    """Hard ones within the second pass, after the first of two steps for which they are mined at once."""
    steps = {"max_steps": 8, "per_device_train_batch_size": 1}
    whole, part, rest = (copy.deepcopy(adapted) for _ in range(3))
    first = train(whole, tiny_tokenizer, tmp_path / "whole", **drawn, **steps)
    train(part, tiny_tokenizer, tmp_path / "part", save_strategy="steps", save_steps=5.0, **drawn, **steps)
    resume = str(tmp_path / "part" / "checkpoint-5")
    second = train(rest, tiny_tokenizer, tmp_path / "rest", resume=resume, **drawn, **steps)
    assert second.trained == first.trained[5:]
    assert torch.equal(weights(whole), weights(rest))


def test_weights_correct_for_popularity_and_lean_to_hard_answers(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The first loss, where all margins are 0: log(1 + the sum of the weights), by Catalogue's own weights."""
    common = {"negatives": "popularity", "num_negatives": 3, "max_steps": 1, "per_device_train_batch_size": 4}
    plain = logged(train(copy.deepcopy(adapted), tiny_tokenizer, tmp_path, **common))[0]
    made = train(copy.deepcopy(adapted), tiny_tokenizer, tmp_path, weigh_negatives=True, **common)
    assert plain == pytest.approx(torch.tensor(4.0).log().item(), abs=1e-5)
    catalogue = Catalogue(ANSWERS, popularity=[8.0, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    losses = []
    for chosen, *rejected in made.trained:
        seen = next(row["seen"] for row in ROWS if row["chosen"] == chosen)
        possible = [p for a, p in zip(ANSWERS, [8.0] + [1.0] * 9, strict=True) if a not in (chosen, *seen)]
        mean = sum(possible) / len(possible)
        total = sum(mean / (8.0 if text == "?" else 1.0) for text in rejected)
        losses.append(torch.tensor(1 + total).log().item())
    assert len(catalogue.answers) == 10
    assert logged(made)[0] == pytest.approx(sum(losses) / 4, abs=1e-5)
    hard = logged(train(copy.deepcopy(adapted), tiny_tokenizer, tmp_path, hardness=1.0, **common | {"max_steps": 3}))
    even = logged(train(copy.deepcopy(adapted), tiny_tokenizer, tmp_path, **common | {"max_steps": 3}))
    assert hard[0] == pytest.approx(even[0], abs=1e-5)  # no margin yet
    assert hard[-1] > even[-1]  # the same answers, of which those that are still likely count more


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"negatives": "hard"}, r"num_negatives=None\) is not possible: say how many hard negatives"),
        ({"negative_stages": [3, 1]}, "fall"),
        ({"negative_stages": [1, 3], "num_negatives": 3}, "num_negatives is given too"),
        ({"negatives": "in-batch", "num_negatives": 4}, "4 negatives of a batch need 5 rows in it"),
        (
            {"negatives": "uniform", "num_negatives": 4, "weigh_negatives": True},
            "weigh_negatives=True.* all have one chance",
        ),
        ({"negatives": "uniform", "num_negatives": 4, "mine_every": 2}, "mine_every=2.* for hard negatives only"),
        ({"negatives": "uniform", "num_negatives": 4, "mine_pool": 9}, "mine_pool=9.* for hard negatives only"),
        ({"negatives": "hard", "num_negatives": 4, "mine_pool": 3}, "4 negatives are mined from it"),
        ({"label_smoothing_factor": 0.1}, "this loss has label_smoothing in its place"),
        ({"train_sampling_strategy": "group_by_length"}, "rows hold several answers"),
        ({"beta": float("inf")}, "above 0, and finite"),
        ({"hardness": -1.0}, r"hardness=-1.0\) is not possible"),
        ({"negatives": "hard", "num_negatives": 1, "mine_every": 0}, r"mine_every=0\) is not possible"),
    ],
)
def test_settings_that_are_not_possible_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rw.SoftmaxDPOConfig(**settings(tmp_path, **change))


def test_a_catalogue_is_needed_where_answers_come_from_it(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    arguments = rw.SoftmaxDPOConfig(**settings(tmp_path, negatives="uniform", num_negatives=3))
    with pytest.raises(UserError, match="drawn from a catalogue of answers, and none is given"):
        rw.SoftmaxDPOTrainer(adapted, arguments, ROWS, processing_class=tiny_tokenizer)


def test_stages_go_on_within_a_window_of_mining(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    made = train(adapted, tiny_tokenizer, tmp_path, negatives="hard", negative_stages=[1, 3], mine_every=4)
    assert [len(texts) - 1 for texts in made.trained] == [1] * 4 + [3] * 4


def test_a_row_whose_batch_has_nothing_for_it_gets_another_rows_answer(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Three rows in batches of two: the last is alone."""
    rows = [{"prompt": "#", "chosen": text} for text in ("?", "@", "%")]
    arguments = settings(tmp_path, negatives="in-batch", num_negatives=1, per_device_train_batch_size=2, max_steps=2)
    made = Watched(adapted, rw.SoftmaxDPOConfig(**arguments), rows, processing_class=tiny_tokenizer)
    made.train()
    assert [len(set(texts)) for texts in made.trained] == [2, 2, 2]
    assert made.counts == {ALONE: 1}


def test_the_chosen_answer_of_a_chat_is_not_drawn(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A template may write the end token after it; the catalogue's text has none."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": "#"}],
            "chosen": [{"role": "assistant", "content": text}],
            "rejected": [[{"role": "assistant", "content": "&"}]],
        }
        for text in ("?", "@")
    ]
    arguments = settings(tmp_path, negatives="uniform", num_negatives=3, per_device_train_batch_size=2, max_steps=2)
    catalogue = Catalogue(["?", "@", "%", "+"])
    made = Watched(adapted, rw.SoftmaxDPOConfig(**arguments), rows, processing_class=tokenizer, catalogue=catalogue)
    made.train()
    assert all(len({text.removesuffix("<|endoftext|>") for text in texts}) == 4 for texts in made.trained)


COMPOSED, APART = "\u00e9", "e\u0301"  # one letter, which some tokenizers read alike in both forms


@pytest.mark.parametrize("kind", ["uniform", "popularity", "hard", "in-batch"])
def test_an_answer_with_the_tokens_of_the_chosen_or_a_seen_one_is_not_drawn(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: Any
) -> None:
    """Qwen's tokenizer normalises likewise."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    rows = [
        {"prompt": "#", "chosen": COMPOSED, "seen": [f"?{APART}"]},
        {"prompt": "##", "chosen": APART, "seen": [f"?{COMPOSED}"]},
        {"prompt": "###", "chosen": "@"},
        {"prompt": "####", "chosen": f"?{COMPOSED}"},
    ]
    catalogue = Catalogue([COMPOSED, APART, f"?{COMPOSED}", "@", "%"], [1.0, 3, 1, 1, 1])
    common = {"negatives": kind, "num_negatives": 3, "max_steps": 4}
    made = Watched(
        adapted,
        rw.SoftmaxDPOConfig(**settings(tmp_path, **common)),
        rows,
        processing_class=tokenizer,
        catalogue=catalogue,
    )
    made.train()
    assert len(made.trained) == 16
    accented, plain = {COMPOSED, f"?{COMPOSED}"}, {"@"} if kind == "in-batch" else {"@", "%"}
    for chosen, *rejected in ([unicodedata.normalize("NFC", text) for text in texts] for texts in made.trained):
        barred = accented if chosen == COMPOSED else {chosen}
        assert sorted(rejected) == sorted((accented | plain) - barred)
    assert made.counts.get(ALIKE) == (None if kind == "in-batch" else 1)


def test_workers_that_load_rows_change_nothing(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Rows come back from them as copies."""
    found = []
    for workers in (0, 1):
        arguments = settings(
            tmp_path,
            negatives="uniform",
            num_negatives=2,
            max_steps=2,
            dataloader_num_workers=workers,
            per_device_train_batch_size=2,
        )
        evaluated = [{"prompt": "#", "chosen": "?", "rejected": ["@"]}]
        made = Watched(
            copy.deepcopy(adapted),
            rw.SoftmaxDPOConfig(**arguments),
            ROWS,
            evaluated,
            processing_class=tiny_tokenizer,
            catalogue=Catalogue(ANSWERS),
        )
        made.train()
        found.append((made.trained, logged(made), made.evaluate(metric_key_prefix="test")["test_ranking/MRR"]))
    assert found[0] == found[1]


def test_a_prompt_leaves_room_for_what_may_be_drawn(
    adapted: PeftModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{"prompt": "#" * 12, "chosen": "?"}, {"prompt": "#" * 12, "chosen": "@%+*"}]
    for kind, longest in (("in-batch", 5), ("uniform", 7)):
        arguments = settings(tmp_path, negatives=kind, num_negatives=1, max_length=15, max_steps=1)
        made = rw.SoftmaxDPOTrainer(
            adapted,
            rw.SoftmaxDPOConfig(**arguments),
            rows,
            processing_class=tiny_tokenizer,
            catalogue=Catalogue(["&&&&&&", "?"]),
        )
        assert [len(row.prompt) for row in made.train_dataset] == [min(13, 15 - longest)] * 2
