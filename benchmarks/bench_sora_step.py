"""A training step of SoRA against plain LoRA and AdaLoRA on a BERT-sized encoder: time, and what is kept in memory.

Adapters of rank 8 on all linear layers of attention and feed-forward. SoRA takes its proximal step with every step of
the optimizer, AdaLoRA its update of importances, as both have to. *SoRA at 70 %* is SoRA after its gates have fallen
to 70 %, without and with the closed directions cut out; *at 30 %* likewise. Memory is what autograd keeps between the
forward and the backward pass, and what lives throughout for training: parameters, gradients and two states of Adam
for what is trained.

    python benchmarks/bench_sora_step.py --runs 15
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import rankwise as rw
from bench_step import kept_bytes
from rankwise.ranks import gates
from timing import interleaved, machine, ratio, seconds, spread, table

TARGETS = ["query", "key", "value", "output.dense", "intermediate.dense"]
FIRST = "LoRA"
STEPS = 1000  # of the trainings that AdaLoRA's schedule and the optimizers are made for


def encoder(layers: int, hidden: int) -> BertForSequenceClassification:
    """An encoder with random weights; the same at every call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": hidden // 64}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **sizes))


def lora(base: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def sora(base: nn.Module, share: float = 1.0, cut: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    """With a share of the gates open, the others closed (or cut out as well)."""
    config = rw.SoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, threshold=1e-6, shrink_after=2 if cut else None)
    model = peft.get_peft_model(base, config)
    for gate in gates(model).values():
        gate.data[torch.rand(8) >= share] = 0
    optimizer = rw.sora_optimizer(model, lr=1e-4, gate_lr=1e-7)
    if cut:
        rw.prune(model, optimizer)
    return model, optimizer


def adalora(base: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    schedule = {"init_r": 8, "target_r": 6, "tinit": 1, "deltaT": 10, "total_step": STEPS}
    # Without a task_type PEFT leaves out the penalty that AdaLoRA has in its loss.
    config = peft.AdaLoraConfig(**schedule, lora_alpha=16, target_modules=TARGETS, task_type="SEQ_CLS")
    model = peft.get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    taken = iter(range(1, STEPS))
    optimizer.register_step_post_hook(lambda *_: model.base_model.update_and_allocate(next(taken)))
    return model, optimizer


WAYS: dict[str, Callable[[nn.Module], tuple[nn.Module, torch.optim.Optimizer]]] = {
    FIRST: lora,
    "SoRA": sora,
    "SoRA at 70 %, closed": lambda base: sora(base, 0.7),
    "SoRA at 70 %, cut": lambda base: sora(base, 0.7, cut=True),
    "SoRA at 30 %, cut": lambda base: sora(base, 0.3, cut=True),
    "AdaLoRA": adalora,
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> Callable[[], float]:
    """One whole step of training, ready to be taken."""

    def take() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return lambda: seconds(take)


class Loss(nn.Module):
    """A model's loss as its output, for :func:`bench_step.kept_bytes`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss.sqrt()  # which kept_bytes squares


def memory(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, float]:
    """MiB that autograd keeps for the backward pass, and MiB of all that is there for the trained parameters."""
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    kept = kept_bytes(Loss(model), batch)  # type: ignore[arg-type]
    return kept / 2**20, 4 * trained / 2**20


def proximal_share(model: nn.Module, optimizer: Any, whole: float) -> str:
    """The part of a step that the gates' own work takes."""
    hooks = optimizer.gate_steps
    times = []
    for _ in range(20):
        for parameter in hooks.gates.parameters:
            parameter.grad = torch.zeros_like(parameter)
        times.append(seconds(lambda: (hooks._before(optimizer, (optimizer,), {}), hooks._after())))
    middle = statistics.median(times)
    return f"{1000 * middle:.2f} ms ({100 * middle / whole:.2f} %)"


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="of each way (%(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="of the encoder (%(default)s)")
    parser.add_argument("--hidden", type=int, default=768, help="its width (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 20000, (16, 64), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(16) % 2}
    made = {way: WAYS[way](encoder(arguments.layers, arguments.hidden)) for way in arguments.ways}
    sizes = {way: memory(model.train(), batch) for way, (model, _) in made.items()}
    for _, optimizer in made.values():
        optimizer.zero_grad()
    found = interleaved({way: step(*pair, batch) for way, pair in made.items()}, arguments.runs)
    print(machine(arguments.threads))
    print(
        f"{arguments.layers} layers of {arguments.hidden}, batch 16 x 64, float32; {arguments.runs} runs of each, in "
        "turns: median (least to most)\n"
    )
    rows = []
    for way, (model, optimizer) in made.items():
        whole = statistics.median(found[way])
        rows.append(
            [
                way,
                spread(found[way]),
                ratio(found[way], found[arguments.ways[0]]),
                ratio(found[way], found[arguments.ways[-1]]),
                f"{sizes[way][0]:.0f} MiB",
                f"{sizes[way][1]:.1f} MiB",
                proximal_share(model, optimizer, whole) if hasattr(optimizer, "gate_steps") else "-",
            ]
        )
    head = [
        "way",
        "seconds",
        f"of {arguments.ways[0]}",
        f"of {arguments.ways[-1]}",
        "kept",
        "trained",
        "gates' own work",
    ]
    print(table(head, rows))


if __name__ == "__main__":
    main()
