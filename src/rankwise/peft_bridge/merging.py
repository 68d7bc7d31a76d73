"""A layer merged in float64 for as long as it is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


@contextmanager
def merged_in_float64(layer: BaseTunerLayer, adapter: str) -> Iterator[dict[nn.Parameter, Tensor]]:
    """Within, the base's weights of the layer are W + D in float64, by PEFT's own way for the layer.

    Yields what each parameter held before, and holds again afterwards, unless other numbers were put there.
    """
    before, noted = {weight: weight.data for weight in layer.parameters()}, list(layer.merged_adapters)
    try:
        for weight in before:
            weight.data = weight.data.double()
        layer.merge(safe_merge=True, adapter_names=[adapter])  # into copies: others may share the old numbers
        yield before
    finally:
        for weight, data in before.items():
            weight.data = data
        layer.merged_adapters[:] = noted
        getattr(layer, "_caches", {}).clear()
