"""One process of several: `python -m torch.distributed.run ... preference_process.py FOLDER OPTIONS`.

Process 0 writes the log and the trained weights to the folder.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import rankwise as rw


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if options.pop("sharded", False):
        torch.distributed.init_process_group("gloo")
        placed = {"distributed_config": DistributedConfig(fsdp_size=processes)}
    else:
        placed = {}
    model = AutoModelForCausalLM.from_pretrained(folder / "model", **placed)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    arguments = rw.SoftmaxDPOConfig(
        logging_steps=1.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        learning_rate=2e-3,
        beta=0.5,
        seed=5,
        **options,
    )
    trainer = rw.SoftmaxDPOTrainer(model, arguments, rows, rows[:5], processing_class=tokenizer, peft_config=config)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    if trainer.is_world_process_zero():
        named = dict(trainer.model.named_parameters())
        adapter = {name: value.detach().clone() for name, value in named.items() if "lora_" in name}
        save_file(adapter, folder / f"{arguments.run_name}.safetensors")
        sharded = sum(isinstance(value, DTensor) for value in named.values())
        found = {"log": trainer.state.log_history, "before": before, "after": after, "sharded": sharded}
        (folder / f"{arguments.run_name}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
