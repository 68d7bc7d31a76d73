"""MiLoRA on weights that DeepSpeed's ZeRO-3 spreads, under transformers' Trainer in two processes on the CPU."""

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
from zero3_process import BATCH, CONFIG, STEPS, arguments, trained

ROOT = Path(__file__).parent.parent
SCRIPT = Path(__file__).with_name("zero3_process.py")
SETTINGS = json.loads((ROOT / "examples" / "processes" / "zero3.json").read_text(encoding="utf-8"))
ON_THE_CPU = {"zero_force_ds_cpu_optimizer": False}


def test_two_processes_start_train_and_save_as_one(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
    base = tiny.make("llama", torch.float32)
    base.save_pretrained(tmp_path / "model")
    rows = torch.randint(base.config.vocab_size, (STEPS * BATCH, 12), generator=torch.Generator().manual_seed(0))
    (tmp_path / "rows.json").write_text(json.dumps(rows.tolist()), encoding="utf-8")
    (tmp_path / "zero3.json").write_text(json.dumps(SETTINGS | ON_THE_CPU), encoding="utf-8")
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
    _, losses = trained(model, arguments(tmp_path, 1), tmp_path)
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(losses, abs=1e-5)
    model.save_pretrained(tmp_path / "own")
    own, spread = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("own", "adapter"))
    assert own.keys() == spread.keys()
    for name, value in own.items():
        torch.testing.assert_close(spread[name], value, atol=1e-5, rtol=0)
