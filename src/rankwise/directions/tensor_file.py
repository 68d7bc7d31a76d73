"""A safetensors file that is written piece by piece."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class TensorFile:
    """A safetensors file whose names and shapes are known first and whose values are written one tensor at a time.

    Args:
        path: of the new file.
        shapes: of all tensors, by name.
        dtype: of all tensors.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.path, self.dtype, self.shapes = path, dtype, dict(shapes)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in self.shapes.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        self._head = (len(text) + (-len(text) % 8)).to_bytes(8, "little") + text.ljust(len(text) + (-len(text) % 8))
        self._starts = {name: len(self._head) + header[name]["data_offsets"][0] for name in self.shapes}
        self._missing = set(self.shapes)

    def __enter__(self) -> TensorFile:
        """Open the file and write its head."""
        self._file = self.path.open("xb")
        self._file.write(self._head)
        return self

    def write(self, name: str, value: Tensor) -> None:
        """Write one tensor, rounded to the file's dtype."""
        if tuple(value.shape) != self.shapes[name]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, not {self.shapes[name]}")
        self._file.seek(self._starts[name])
        self._file.write(value.detach().to("cpu", self.dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; all tensors must have been written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"{self.path}: nothing was written for {', '.join(sorted(self._missing))}")
