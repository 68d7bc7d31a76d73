"""What merging into bfloat16 changes: logits with an adapter merged into the weights, and with it beside them.

A small Llama with seeded random weights is trained for some steps in float32, on sequences with a rule to learn. Its
base is then taken as bfloat16, and the adapter is exported twice: merged, and as plain LoRA. Both are compared with the
same model computed in float64, in which nothing is rounded but the base once: with their weights alone in bfloat16 and
all sums in float64, which shows what the merge itself loses, and with everything in bfloat16, as models are served.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import rankwise as rw
from rankwise.models import quiet_libraries
from timing import machine, table

METHODS = {"LoRA": LoraConfig, "MiLoRA": rw.MiloraConfig}
HEAD = ["method", "rank", "computed", "largest difference", "mean difference", "same top token", "update lost"]


def base(hidden: int) -> LlamaForCausalLM:
    """A Llama of four layers, rounded to bfloat16, in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval().bfloat16().float()


def sequences(count: int, seed: int) -> Tensor:
    """Each token follows from the one before by a fixed rule, but for one in four, which is random."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(256, (count, 64), generator=generator)
    keep = torch.rand(ids.shape, generator=generator) < 0.75
    for place in range(1, ids.shape[1]):
        ids[:, place] = torch.where(keep[:, place], (7 * ids[:, place - 1] + 3) % 256, ids[:, place])
    return ids


def trained(method: str, rank: int, steps: int, hidden: int) -> PeftModel:
    """The adapter after some steps of Adam, in evaluation mode."""
    torch.manual_seed(1)
    config = METHODS[method](r=rank, lora_alpha=rank, target_modules="all-linear")
    model = get_peft_model(base(hidden), config)
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    for step in range(steps):
        ids = sequences(8, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Logits in float64, flattened over the tokens."""
    return model(input_ids=ids).logits.double().flatten(0, 1)


def row(method: str, rank: int, how: str, found: Tensor, exact: Tensor, lost: str) -> list[str]:
    """One line of the table."""
    difference = (found - exact).abs() / exact.std()
    same = float((found.argmax(-1) == exact.argmax(-1)).double().mean())
    return [method, str(rank), how, f"{difference.max():.4f}", f"{difference.mean():.5f}", f"{same:.2%}", lost]


def compare(method: str, rank: int, steps: int, hidden: int, folder: Path) -> list[list[str]]:
    """The merged model and the unmerged one, each against float64; differences in units of the logits' spread."""
    model, ids = trained(method, rank, steps, hidden), sequences(16, seed=10_000)
    exact = logits(copy.deepcopy(model).double(), ids)
    for layer in model.get_base_model().modules():  # the base as it is served; the adapter stays in float32
        if hasattr(layer, "base_layer"):
            layer.base_layer.bfloat16()
    merged = rw.export(model, folder / "merged", layout="merged")
    rw.export(model, folder / "adapter")
    lost, rows = f"{merged.relative_error:.2%}", []
    for how, dtype in (("bfloat16 weights", torch.float64), ("all bfloat16", torch.bfloat16)):
        whole = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=dtype, trust_remote_code=False).eval()
        beside = PeftModel.from_pretrained(base(hidden).to(dtype), folder / "adapter").eval()
        rows.append(row(method, rank, f"merged, {how}", logits(whole, ids), exact, lost))
        rows.append(row(method, rank, f"unmerged, {how}", logits(beside, ids), exact, "0.00%"))
    return rows


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of training (%(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32], help="of the adapters (%(default)s)")
    wanted = parser.parse_args()
    quiet_libraries()
    rows = []
    for method in METHODS:
        for rank in wanted.ranks:
            with tempfile.TemporaryDirectory() as folder:
                rows += compare(method, rank, wanted.steps, wanted.hidden, Path(folder))
    print(machine(torch.get_num_threads()))
    print(f"Llama of four layers, hidden size {wanted.hidden}, {wanted.steps} steps of training; 1,024 tokens.")
    print("Differences from float64, as shares of the logits' standard deviation.\n")
    print(table(HEAD, rows))


if __name__ == "__main__":
    main()
