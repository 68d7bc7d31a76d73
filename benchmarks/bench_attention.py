"""Attention in bfloat16 on a CPU, and in float32 in its place: the kernel alone, and a training step of LoRA.

Processor time of a forward and backward pass, in turns. The step is that of an encoder of MiniLM's shape (6 layers of
384, 12 heads) with random weights and LoRA of rank 16 on all linear layers, under autocast but for *float32*. Errors
are of the gradient of the queries, against float64: largest difference over the largest value.

    python benchmarks/bench_attention.py --runs 9
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

from rankwise.attention import Float32Attention
from timing import interleaved, machine, ratio, spread, table

HEAD = ["what", "length", "float32", "bfloat16", "float32 within bfloat16", "ratio", "error: bfloat16, float32 within"]
WAYS = {
    "float32": (torch.float32, contextlib.nullcontext),
    "bfloat16": (torch.bfloat16, contextlib.nullcontext),
    "within": (torch.bfloat16, Float32Attention),
}


def milliseconds(work: Callable[[], object]) -> float:
    """Processor time of one call: other work of the machine does not count."""
    started = time.process_time()
    work()
    return 1000 * (time.process_time() - started)


def gradient(
    inputs: list[Tensor], dtype: torch.dtype, within: Callable[[], contextlib.AbstractContextManager]
) -> Tensor:
    """Of the queries, after one pass forward and back."""
    query, key, value, weights = (tensor.to(dtype).detach().requires_grad_() for tensor in inputs)
    with within():
        functional.scaled_dot_product_attention(query, key, value).backward(weights.detach())
    assert query.grad is not None
    return query.grad.double()


def kernel(batch: int, length: int, runs: int) -> list[str]:
    """A line of the table, for 12 heads of 32."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(batch, 12, length, 32, generator=generator).bfloat16() for _ in range(4)]
    measures = {name: lambda way=way: milliseconds(lambda: gradient(inputs, *way)) for name, way in WAYS.items()}
    exact = gradient(inputs, torch.float64, contextlib.nullcontext)
    found = (gradient(inputs, *WAYS[name]) for name in ("bfloat16", "within"))
    errors = ", ".join(f"{(one - exact).abs().max() / exact.abs().max():.1e}" for one in found)
    return line(f"attention, {batch} rows", length, interleaved(measures, runs), errors)


def step(batch: int, length: int, runs: int) -> list[str]:
    """A line of the table, for a step of training."""
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536, "num_attention_heads": 12}
    config = BertConfig(**shape, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    settings = peft.LoraConfig(r=16, target_modules="all-linear", task_type="SEQ_CLS")
    model: nn.Module = peft.get_peft_model(BertForSequenceClassification(config), settings)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    ids, labels = torch.randint(config.vocab_size, (batch, length)), torch.randint(2, (batch,))

    def taken(dtype: torch.dtype, within: Callable[[], contextlib.AbstractContextManager]) -> None:
        with within():
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    measures = {name: lambda way=way: milliseconds(lambda: taken(*way)) for name, way in WAYS.items()}
    return line(f"step, {batch} rows", length, interleaved(measures, runs), "")


def line(what: str, length: int, times: dict[str, list[float]], errors: str) -> list[str]:
    """The ratio is of float32 within bfloat16 to bfloat16."""
    cells = [spread(values, "ms", 1) for values in times.values()]
    return [what, str(length), *cells, ratio(times["within"], times["bfloat16"]), errors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="passes of each way (default: 9)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 512], help="tokens of a row")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(machine(given.threads))
    rows = [kernel(max(1, 1024 // length), length, given.runs) for length in given.lengths]
    rows += [step(max(1, 1024 // length), length, given.runs) for length in given.lengths]
    print(table(HEAD, rows))


if __name__ == "__main__":
    main()
