"""One process of several, over which ZeRO-3 spreads the weights: `torchrun ... zero3_process.py FOLDER`.

The folder holds `model`, `rows.json` and `zero3.json`; it gets the adapter's start, the losses and the adapter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import peft
import torch
from safetensors.torch import save_file
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

import rankwise as rw

STEPS, BATCH, RATE = 4, 4, 1e-2
CONFIG = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def main() -> None:
    folder = Path(sys.argv[1])
    settings = json.loads((folder / "zero3.json").read_text(encoding="utf-8"))
    deepspeed.init_distributed(dist_backend="gloo")
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    spread = HfDeepSpeedConfig(settings)  # while it is there, transformers spreads what it loads
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert all(weight.numel() == 0 and hasattr(weight, "ds_id") for weight in model.parameters()), spread
    model = peft.get_peft_model(model, rw.MiloraConfig(**CONFIG))
    if rank == 0:
        start = {name: value.detach() for name, value in model.named_parameters() if "lora_" in name}
        save_file(start, folder / "start.safetensors")
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=optimizer, config=settings)
    rows = torch.tensor(json.loads((folder / "rows.json").read_text(encoding="utf-8")))
    losses = []
    for batch in rows.split(BATCH)[:STEPS]:
        own = batch.chunk(processes)[rank]
        loss = engine(input_ids=own, labels=own).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach() / processes
        distributed.all_reduce(mean)
        losses.append(float(mean))
    state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    if rank == 0:  # as transformers' Trainer saves it
        model.save_pretrained(folder / "adapter", state_dict=state)
        (folder / "losses.json").write_text(json.dumps(losses), encoding="utf-8")


if __name__ == "__main__":
    main()
