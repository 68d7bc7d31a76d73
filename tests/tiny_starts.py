"""Checkpoints of small models on disk, and settings of a start, for tests of starts."""

from __future__ import annotations

from pathlib import Path

import torch

import rankwise as rw
import tiny


def settings(family: str = "llama", **others) -> rw.MiloraConfig:
    return rw.MiloraConfig(**{"r": 4, "target_modules": tiny.TARGETS[family]} | others)


def saved(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    tiny.make(family, dtype).save_pretrained(folder, max_shard_size=shard)
    return folder
