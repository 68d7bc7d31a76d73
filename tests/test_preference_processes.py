"""Two processes train as one does with the same rows to a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from test_preference_training import rows

SCRIPT = Path(__file__).with_name("preference_process.py")
MEASURES = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "negatives/effective")


def run(folder: Path, processes: int, name: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The log and the adapter of a training."""
    options = {"output_dir": str(folder / name), "run_name": name, "max_steps": 6, **options}
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launch if processes > 1 else []), str(SCRIPT), str(folder), json.dumps(options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(
    tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, way: str
) -> None:
    """Losses, measures and weights at every step; rows of different numbers of negatives, accumulated batches.

    The model is evaluated before it is trained, after which accelerate would not wrap it any more.
    """
    tiny_llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    data = rows(16, 4)
    for number, row in enumerate(data):
        row["rejected"] = row["rejected"][: 1 + number % 4]
    (tmp_path / "rows.json").write_text(json.dumps(data))
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    one, own = run(tmp_path, 1, "one", batches)
    halved = batches | {"per_device_train_batch_size": 2, "sharded": way == "fsdp2"}
    two, other = run(tmp_path, 2, way, halved)
    assert (two["sharded"] > 0) == (way == "fsdp2")
    for name in MEASURES:
        found, expected = ([line[name] for line in log["log"] if name in line] for log in (two, one))
        assert len(found) == 6
        assert found == pytest.approx(expected, abs=2e-5, rel=1e-4), name
    for part in ("before", "after"):
        timed = ("runtime", "second", "preparation")
        wanted = {name: value for name, value in one[part].items() if not any(word in name for word in timed)}
        assert {name: two[part][name] for name in wanted} == pytest.approx(wanted, abs=1e-4)
    assert own.keys() == other.keys()
    for name, value in own.items():
        torch.testing.assert_close(other[name], value, atol=1e-5, rtol=1e-3)
