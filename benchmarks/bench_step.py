"""A training step of MiLoRA against plain LoRA of the same rank and of twice the rank: time and memory.

The model is four Linear layers, with a nonlinearity between them, that all have an adapter. Memory is what autograd
keeps between the forward and the backward pass (each tensor's storage once, parameters and buffers left out), and the
tensors that live throughout: parameters, buffers, gradients and two states of Adam for what is trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import peft
import torch
from torch import Tensor, nn

import rankwise as rw
from timing import interleaved, machine, ratio, seconds, spread, table

LAYERS = 4
WAYS = ("plain LoRA", "MiLoRA", "plain LoRA of twice the rank")


def stack(size: int) -> nn.Sequential:
    """Linear layers with a nonlinearity after each; the same weights at every call."""
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(size, size, bias=False), nn.SiLU()) for _ in range(LAYERS)])


def adapted(way: str, size: int, rank: int, dtype: torch.dtype) -> nn.Module:
    """The model of one way, trained once so that no factor is zero."""
    targets = [f"{layer}.0" for layer in range(LAYERS)]
    base = stack(size).to(dtype)
    if way == "MiLoRA":
        # The directions make no difference to the time: none are computed.
        config = rw.MiloraConfig(r=rank, target_modules=targets, init_lora_weights=False)
    else:
        config = peft.LoraConfig(r=rank if way == WAYS[0] else 2 * rank, target_modules=targets)
    return peft.get_peft_model(base, config).train()


def step(model: nn.Module, x: Tensor) -> Callable[[], float]:
    """One step of AdamW, ready to be taken."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def take() -> None:
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return lambda: seconds(take)


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that autograd keeps for the backward pass, beside those that live throughout."""
    lasting = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in lasting:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(x).float().square().mean()
    total = sum(found.values())
    loss.backward()
    return total


def lasting_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, and of gradient and Adam's two states for what is trained."""
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers())) + 3 * trained


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=21, help="of each way (%(default)s)")
    parser.add_argument("--size", type=int, default=2048, help="inputs and outputs of a layer (%(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (%(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="in a batch (%(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    x = torch.randn(1, arguments.tokens, arguments.size, generator=torch.Generator().manual_seed(1)).to(dtype)
    models = {way: adapted(way, arguments.size, arguments.rank, dtype) for way in WAYS}
    memory = {way: kept_bytes(model, x) + lasting_bytes(model) for way, model in models.items()}
    found = interleaved({way: step(model, x) for way, model in models.items()}, arguments.runs)
    print(machine(arguments.threads))
    print(
        f"{LAYERS} layers of {arguments.size} x {arguments.size}, rank {arguments.rank}, {arguments.tokens} tokens, "
        f"{arguments.dtype}; {arguments.runs} runs of each, in turns: median (least to most)\n"
    )
    rows = [
        [
            way,
            spread(found[way]),
            ratio(found[way], found[WAYS[0]]),
            f"{memory[way] / 2**20:.1f} MiB",
            f"{memory[way] / memory[WAYS[0]]:.3f}",
        ]
        for way in WAYS
    ]
    print(table(["way", "seconds", "of plain LoRA", "memory", "of plain LoRA"], rows))


if __name__ == "__main__":
    main()
