"""The update that starts from a part of a weight's spectrum: trained factors beside a frozen copy of their start."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from peft import LoraConfig
from peft.tuners.lora.layer import Embedding, LoraLayer, _ConvNd
from torch import Tensor, nn

from rankwise.directions.cache import check_device
from rankwise.directions.dequantise import dense_weight
from rankwise.directions.difference import Pairs, add_difference
from rankwise.directions.start import Start, spectral_start
from rankwise.errors import UserError
from rankwise.peft_bridge import LowRankVariant, keep_state
from rankwise.peft_bridge.matrices import (
    as_matrix,
    direction_axis,
    expand,
    factor_matrices,
    factor_parameters,
    project,
    set_factors,
)

START = "lora_start"
READY = "ready_start"  # in a layer whose weight is spread over processes: what one of them has computed


class FrozenPair(nn.Module):
    """The initial A0 and B0 of one adapter: buffers, so that they are saved and moved but never trained.

    They have the shapes of the layer's own A and B, and are kept in float32 at least.

    Args:
        a: A0 as PEFT keeps A.
        b: B0 as PEFT keeps B.
        config: of the adapter, by which another one of the same start is known.

    Attributes:
        started: with how many directions a start was put here; 0 where other values came since.
    """

    A: Float[Tensor, "rank ..."]
    B: Float[Tensor, "out rank ..."]

    def __init__(self, a: Float[Tensor, "rank ..."], b: Float[Tensor, "out rank ..."], config: LoraConfig) -> None:
        super().__init__()
        self.register_buffer("A", a)
        self.register_buffer("B", b)
        self.config, self.started = config, 0

    @torch.no_grad()
    def set(self, a: Float[Tensor, "rank in"], b: Float[Tensor, "out rank"]) -> None:
        """Replace A0 and B0, of any rank."""
        self.A = a.detach().to(self.A.dtype).reshape(-1, *self.A.shape[1:]).clone()
        self.B = b.detach().to(self.B.dtype).reshape(*b.shape, *self.B.shape[2:]).clone()
        self.started = 0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Torch's hook: what a file holds may be what was left of a start."""
        if f"{prefix}A" in state_dict:
            self.started = 0
        super()._load_from_state_dict(state_dict, prefix, *rest)


class SpectralVariant(LowRankVariant):
    """The update s (B A - B0 A0), computed as s ((B - B0) A + B0 (A - A0)): exactly zero at the start."""

    def attach(self, layer: LoraLayer, adapter: str, config: LoraConfig) -> None:
        """Keep room for a frozen copy of A and B."""
        a, b = factor_parameters(layer, adapter)
        keep_state(layer, START, adapter, FrozenPair(a.detach().clone(), b.detach().clone(), config))

    def check(self, layer: LoraLayer, adapter: str, config: LoraConfig) -> None:
        """Refuse a rank above the smaller side of the weight, where its spectrum is asked for."""
        b, a = factor_matrices(layer, adapter)
        if config.init_lora_weights is not False and len(a) > min(len(b), a.shape[1]):
            shape = len(b), a.shape[1]
            raise UserError(f"rank {len(a)} of a weight of shape {shape}: 1 to its smaller side is possible")

    def start(self, layer: LoraLayer, adapter: str, config: LoraConfig) -> int:
        """Set A and B to the chosen triplets, and the frozen pair with them.

        With ``init_lora_weights=False`` A and B stay as they are, since their values come from a file. Where another
        adapter of the layer has the same start, it is copied instead of computed again.
        """
        b, a = factor_matrices(layer, adapter)
        weight = getattr(layer.get_base_layer(), "weight", None)
        if a.is_meta and not (isinstance(weight, Tensor) and weight.is_meta):
            return 0  # low_cpu_mem_usage: the values are loaded later
        twin, zero = find_twin(layer, adapter, config), 0
        if twin is not None:
            set_factors(layer, adapter, twin.B.flatten(1), twin.A.flatten(1))
        elif config.init_lora_weights is not False:
            zero = start_from_spectrum(layer, adapter, config)
        if not a.is_meta:
            b, a = factor_matrices(layer, adapter)
            held = getattr(layer, START)[adapter]
            held.set(a, b)
            held.started = len(a)
        return zero

    def set_update(self, layer: LoraLayer, adapter: str, b: Float[Tensor, "out k"], a: Float[Tensor, "k in"]) -> None:
        """As the base class's; the frozen pair is zero."""
        super().set_update(layer, adapter, b, a)
        getattr(layer, START)[adapter].set(torch.zeros_like(a), torch.zeros_like(b))

    def pairs(self, layer: LoraLayer, adapter: str) -> Pairs:
        """A, B, A0 and B0 as matrices."""
        b, a = factor_matrices(layer, adapter)
        held = getattr(layer, START)[adapter]
        return Pairs(a, b, held.A.flatten(1), held.B.flatten(1))

    def factors(self, layer: LoraLayer, adapter: str) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        """[B - B0, B0] and [A; A - A0], detached."""
        b, a = self.pairs(layer, adapter).stacked()
        return b.detach(), a.detach()

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """PEFT's hook: the layer's output with the update added."""
        pairs = self.pairs(module, active_adapter)
        dropout = module.lora_dropout[active_adapter]
        scaling = module.scaling[active_adapter]
        if isinstance(module, Embedding):
            hidden = embedded(module, x, pairs)
        elif isinstance(module, _ConvNd):
            hidden = project(module, dropout(x), pairs.stacked()[1])
        else:
            return add_difference(result, dropout(x), pairs, scaling)
        update: Tensor = expand(module, hidden, pairs.stacked()[0]) * scaling
        return result + update


def embedded(layer: Embedding, x: Tensor, pairs: Pairs) -> Tensor:
    """[A x; (A - A0) x] for token numbers: only their columns are read, where the stack would hold a vocabulary."""
    hidden = project(layer, x, pairs.A)
    frozen = project(layer, x, pairs.A0.to(pairs.A.dtype))
    return torch.cat([hidden, hidden - frozen], dim=direction_axis(layer))


def find_twin(layer: LoraLayer, adapter: str, config: LoraConfig) -> FrozenPair | None:
    """The frozen pair of another adapter of the layer with the same start, or none.

    One that was cut, or loaded from a file, may be of other directions than a start of its size.
    """
    own, rank = getattr(layer, START)[adapter], layer.r[adapter]
    for name, other in getattr(layer, START).items():
        same_size = other.A.shape == own.A.shape and layer.scaling[name] == layer.scaling[adapter]
        whole = other.started == rank or config.init_lora_weights is False
        if name != adapter and same_size and whole and not other.A.is_meta and _same_start(other.config, config):
            return cast(FrozenPair, other)
    return None


def _same_start(one: LoraConfig, other: LoraConfig) -> bool:
    computed = (one.init_lora_weights is not False, other.init_lora_weights is not False)
    same_part = (one.part, one.part_seed) == (other.part, other.part_seed)
    return same_part and computed[0] == computed[1]


def check_start_device(device: str | None) -> None:
    """Raise a ``UserError`` for a device on which nothing can be decomposed."""
    if device is not None and str(device).partition(":")[0] == "meta":
        raise UserError("start_device 'meta' holds no values to decompose: give 'cpu' or 'cuda', or leave it out")
    check_device(device)


def start_from_spectrum(layer: LoraLayer, adapter: str, config: LoraConfig) -> int:
    """Fill A and B with the chosen part of the layer's weight; returns how many directions are numerically zero.

    Raises:
        UserError: the weight has no values or cannot be unpacked, is merged, not finite, or smaller than the rank; or
            there is no such device.
    """
    ready: Start | None = layer.__dict__.get(READY)
    b, a, zero = ready or compute_start(layer, adapter, config, dense_weight(layer.get_base_layer()))
    set_factors(layer, adapter, b, a)
    return zero


def compute_start(layer: LoraLayer, adapter: str, config: LoraConfig, dense: Tensor) -> Start:
    """The start of a layer's adapter from its weight, in the weight's own layout.

    Raises:
        UserError: as for :func:`start_from_spectrum`.
    """
    if layer.merged:
        raise UserError("another adapter is merged into its weight: unmerge it before adding this one")
    device, cache = getattr(config, "start_device", None), getattr(config, "cache", None)
    check_start_device(device)
    rank, scaling = layer.r[adapter], layer.scaling[adapter]
    weight = as_matrix(layer, dense).to(device)
    return spectral_start(weight, rank, config.part, config.part_seed, scaling, cache)
