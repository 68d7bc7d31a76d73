"""The rows of an event in parts: those of its batch, the same scores, and less padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import tiny
from rankwise.errors import UserError
from rankwise.ranks import AllocationCallback, importance
from rankwise.ranks.allocating.rows import rows_of_events

Row = dict[str, Any]


def made_rows(family: str, number: int) -> list[Row]:
    """Of two to thirteen tokens; with a label each, or with labels on all but the first one or two tokens."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for at in range(number):
        ids = torch.randint(1, 48, (2 + int(torch.randint(12, (), generator=generator)),), generator=generator).tolist()
        prompt = 1 + at % 2
        labels = at % 3 if family == "bert" else [-100] * prompt + ids[prompt:]
        found.append({"input_ids": ids, "labels": labels})
    return found


def collate(rows: list[Row]) -> dict[str, Tensor]:
    def padded(values: list[list[int]], filler: int) -> Tensor:
        width = max(map(len, values))
        return torch.tensor([value + [filler] * (width - len(value)) for value in values])

    ids = [row["input_ids"] for row in rows]
    labels = [row["labels"] for row in rows]
    return {
        "input_ids": padded(ids, 0),
        "attention_mask": padded([[1] * len(one) for one in ids], 0),
        "labels": torch.tensor(labels) if isinstance(labels[0], int) else padded(labels, -100),
    }


def trainer(family: str, folder: Path, rows: list[Row], train: int = 3, evaluation: int = 8, **changes: Any) -> Trainer:
    config = peft.LoraConfig(r=2, target_modules=tiny.TARGETS[family], init_lora_weights=False)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=train,
        per_device_eval_batch_size=evaluation,
        report_to="none",
        use_cpu=True,
        **changes,
    )
    model = peft.get_peft_model(tiny.make(family), config).eval()
    return Trainer(model=model, args=arguments, data_collator=collate, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_scores_are_those_of_the_whole_batch(family: str, tmp_path: Path) -> None:
    """Parts of two rows of an evaluation by eight; tokens with labels weigh alike, whichever part they are in."""
    rows = made_rows(family, 20)
    made = trainer(family, tmp_path, rows)
    events = rows_of_events(made, 3)
    assert [[len(part.batch["input_ids"]) for part in event] for event in events] == [[2] * 4, [2] * 4, [2] * 2]
    callback = AllocationCallback(made, events=3)
    for at, event in enumerate(events):
        whole = collate(rows[8 * at : 8 * at + 8])
        found = callback._scores(made.model, event)
        expected = importance(made.model, lambda model, whole=whole: model(**whole).loss)
        assert list(found) == list(expected)
        for name, scores in expected.items():
            torch.testing.assert_close(found[name], scores, rtol=0, atol=2e-6)
        assert sum(part.batch["input_ids"].numel() for part in event) < whole["input_ids"].numel()
        seen = sorted(ids for part in event for ids in part.batch["input_ids"][:, 0].tolist())
        assert seen == sorted(row["input_ids"][0] for row in rows[8 * at : 8 * at + 8])
    assert made.args.per_device_eval_batch_size == 8


@pytest.mark.parametrize(("train", "evaluation", "part"), [(8, 8, 8), (16, 8, 8), (7, 8, 4), (4, 10, 2), (3, 7, 1)])
def test_parts_fill_a_batch_of_evaluation_and_fit_one_of_training(
    train: int, evaluation: int, part: int, tmp_path: Path
) -> None:
    events = rows_of_events(trainer("bert", tmp_path, made_rows("bert", 30), train, evaluation), 2)
    assert [[len(one.batch["labels"]) for one in event] for event in events] == [[part] * (evaluation // part)] * 2


def test_the_trainers_own_evaluation_keeps_its_dataloader(tmp_path: Path) -> None:
    """Also one whose workers persist, which the trainer keeps; and rows that fill no part are scored on."""
    kept = {"dataloader_persistent_workers": True, "dataloader_num_workers": 1, "dataloader_drop_last": True}
    made = trainer("bert", tmp_path, made_rows("bert", 21), **kept)
    before = made.args.to_dict()
    events = rows_of_events(made, 3)
    assert [[len(part.batch["labels"]) for part in event] for event in events] == [[2] * 4, [2] * 4, [2, 2, 1]]
    assert made.args.to_dict() == before
    assert [len(batch["labels"]) for batch in made.get_eval_dataloader()] == [8, 8]
    assert [[len(part.batch["labels"]) for part in event] for event in rows_of_events(made, 1)] == [[2] * 4]


def test_a_batch_of_several_devices_is_one_event(tmp_path: Path) -> None:
    made = trainer("bert", tmp_path, made_rows("bert", 40))
    made.args._n_gpu = 2
    events = rows_of_events(made, 2)
    assert [[len(part.batch["labels"]) for part in event] for event in events] == [[4] * 4] * 2


def test_rows_without_a_label_are_left_out_but_not_all(tmp_path: Path) -> None:
    """A part without any would have no mean; it counts for nothing in the batch's."""
    rows = made_rows("llama", 8)
    shortest = sorted(rows, key=lambda row: len(row["input_ids"]))[:2]
    for row in shortest:
        row["labels"] = [-100] * len(row["labels"])
    made = trainer("llama", tmp_path, rows)
    (event,) = rows_of_events(made, 1)
    assert len(event) == 3
    found = AllocationCallback(made, events=1)._scores(made.model, event)
    expected = importance(made.model, lambda model: model(**collate(rows)).loss)
    for name, scores in expected.items():
        torch.testing.assert_close(found[name], scores, rtol=0, atol=2e-6)
    for row in rows:
        row["labels"] = [-100] * len(row["labels"])
    (event,) = rows_of_events(made, 1)
    with pytest.raises(UserError, match="the loss of the validation rows is nan"):
        AllocationCallback(made, events=1)._scores(made.model, event)


def test_directions_are_scored_in_float32_and_trained_in_bfloat16(tmp_path: Path) -> None:
    made = trainer("llama", tmp_path, made_rows("llama", 20), bf16=True, max_steps=4)
    made.add_callback(AllocationCallback(made, events=2, share=0.3, first=0.3, last=0.5))
    layer = made.model.get_base_model().model.layers[0].self_attn.o_proj  # without an adapter, which would be resized
    found: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    layer.register_forward_hook(lambda layer, given, output: found[layer.training].add(output.dtype))
    steps: list[torch.dtype] = []
    layer.register_forward_hook(lambda layer, given, output: steps.append(output.dtype) if layer.training else None)
    made.train()
    assert found == {True: {torch.bfloat16}, False: {torch.float32}}
    assert len(steps) == 4


@pytest.mark.parametrize("raises", [False, True])
def test_scores_under_autocast_are_those_without(raises: bool, tmp_path: Path) -> None:
    """Around the model's forward, as accelerate puts it, and around the scoring; afterwards both are there again."""
    rows = made_rows("llama", 8)
    made = trainer("llama", tmp_path, rows, bf16=True)
    model, batch = made.model, collate(rows)
    expected = importance(model, lambda model: model(**batch).loss)
    own = model(**batch).loss
    wrapped = made.accelerator.prepare_model(model)
    before = wrapped(**batch).loss
    assert not torch.equal(before, own)

    def loss(model: torch.nn.Module) -> Tensor:
        if raises:
            raise ValueError("of the loss")
        return model(**batch).loss

    with torch.autocast("cpu", torch.bfloat16):
        if raises:
            with pytest.raises(ValueError, match="of the loss"):
                importance(wrapped, loss)
        else:
            found = importance(wrapped, loss)
            assert all(torch.equal(found[name], scores) for name, scores in expected.items())
    assert torch.equal(wrapped(**batch).loss, before)


def test_weights_of_bfloat16_keep_their_autocast(tmp_path: Path) -> None:
    """Some weights may need it, beside others of float32."""
    rows = made_rows("llama", 8)
    made = trainer("llama", tmp_path, rows, bf16=True)
    base = made.model.get_base_model()
    base.lm_head.to(torch.bfloat16)  # takes no float32 without autocast
    wrapped = made.accelerator.prepare_model(made.model)
    assert importance(wrapped, lambda model: model(**collate(rows)).loss)
