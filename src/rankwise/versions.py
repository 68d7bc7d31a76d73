"""What a result stands on: versions of libraries, and the machine."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch

import rankwise

PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "polars", "numpy")
PLACE = ("platform", "processor", "device")  # where a run is, not what it runs
CPUINFO = Path("/proc/cpuinfo")


def versions() -> dict[str, str]:
    """Versions of what the result depends on, and the machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return {
        "rankwise": rankwise.__version__,
        **{name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "device": device,
    }


def processor() -> str:
    """Its name, as far as the system tells it."""
    told = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines() if CPUINFO.is_file() else []
    names = [line.partition(":")[2].strip() for line in told if line.startswith("model name")]
    return next(filter(None, [*names[:1], platform.processor()]), platform.machine())


def differing(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """What was another then, by name: then and now; of names that both know."""
    return {name: (before[name], one) for name, one in now.items() if before.get(name, one) != one}


def mixed(found: Iterable[Mapping[str, str]]) -> dict[str, dict[str, int]]:
    """Of what several results do not share, how many stand on which, the most frequent first; those that kept it."""
    kept = list(found)
    names = dict.fromkeys(name for one in kept for name in one)
    counts = {name: Counter(one[name] for one in kept if name in one) for name in names}
    return {name: dict(count.most_common()) for name, count in counts.items() if len(count) > 1}
