"""One process of several, over which ZeRO-3 spreads the weights: `torchrun ... zero3_process.py FOLDER`.

The folder holds `model`, `rows.json` and `zero3.json`; it gets the adapter's start, the losses and the adapter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import rankwise as rw

STEPS, BATCH = 4, 4
CONFIG = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def arguments(folder: Path, processes: int, **options: Any) -> TrainingArguments:
    """Of the training, the same for any number of processes."""
    return TrainingArguments(
        output_dir=str(folder / "trainer"),
        use_cpu=True,
        per_device_train_batch_size=BATCH // processes,
        num_train_epochs=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        **options,
    )


def trained(model: PeftModel, settings: TrainingArguments, folder: Path) -> tuple[Trainer, list[float]]:
    """The trainer after its training, and the loss of each step."""
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    trainer = Trainer(model, settings, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    return trainer, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def main() -> None:
    folder = Path(sys.argv[1])
    settings = arguments(folder, 2, deepspeed=str(folder / "zero3.json"))  # from now on, weights that load are spread
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert all(weight.numel() == 0 and hasattr(weight, "ds_id") for weight in model.parameters())
    model = peft.get_peft_model(model, rw.MiloraConfig(**CONFIG))
    if settings.process_index == 0:
        start = {name: value.detach() for name, value in model.named_parameters() if "lora_" in name}
        save_file(start, folder / "start.safetensors")
    trainer, losses = trained(model, settings, folder)
    trainer.save_model(str(folder / "adapter"))
    if settings.process_index == 0:
        (folder / "losses.json").write_text(json.dumps(losses), encoding="utf-8")


if __name__ == "__main__":
    main()
