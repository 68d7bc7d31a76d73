"""MiLoRA on weights that DeepSpeed's ZeRO-3 spreads, in two processes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rankwise as rw
import tiny

ROOT = Path(__file__).parent.parent
SCRIPT = Path(__file__).with_name("zero3_process.py")
SETTINGS = json.loads((ROOT / "examples" / "processes" / "zero3.json").read_text(encoding="utf-8"))
FILLED = {  # what transformers' Trainer fills in, as on the CPU, in single precision
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "bf16": {"enabled": False},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def test_two_processes_start_train_and_save_as_one(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
    from zero3_process import BATCH, CONFIG, RATE, STEPS

    base = tiny.make("llama", torch.float32)
    base.save_pretrained(tmp_path / "model")
    rows = torch.randint(base.config.vocab_size, (STEPS * BATCH, 12), generator=torch.Generator().manual_seed(0))
    (tmp_path / "rows.json").write_text(json.dumps(rows.tolist()), encoding="utf-8")
    (tmp_path / "zero3.json").write_text(json.dumps(SETTINGS | FILLED), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*launch, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = peft.get_peft_model(base, rw.MiloraConfig(**CONFIG))
    start = load_file(tmp_path / "start.safetensors")
    alone = {name: value.detach() for name, value in model.named_parameters() if "lora_" in name}
    assert start.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(start[name], value, atol=1e-6, rtol=0)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=RATE)
    for batch, told in zip(rows.split(BATCH), json.loads((tmp_path / "losses.json").read_text()), strict=True):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert told == pytest.approx(loss.item(), abs=1e-5)
    model.save_pretrained(tmp_path / "own")
    own, spread = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("own", "adapter"))
    assert own.keys() == spread.keys()
    for name, value in own.items():
        torch.testing.assert_close(spread[name], value, atol=1e-5, rtol=0)
