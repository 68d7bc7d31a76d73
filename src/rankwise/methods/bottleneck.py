"""Bottleneck adapters: a small network of two matrices after a block, as a tuner of PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from rankwise.errors import UserError
from rankwise.peft_bridge import Kind, base_modules, register

# Ends of the names of the modules that close a block before its residual sum, in the families of transformers.
ATTENTION = (
    *("attention.output.dense", "o_proj", "out_proj", "attn.c_proj", "SelfAttention.o", "EncDecAttention.o"),
    *("attention.out_lin", "self_attn.dense", "self_attention.dense", "attention.dense"),
)
FEED_FORWARD = (
    *("output.dense", "down_proj", "fc2", "mlp.c_proj", "DenseReluDense.wo", "ffn.lin2", "dense_4h_to_h"),
    *("ffn.wo", "mlp.fc_out", "ffn_output"),
)
START_DEVIATION = 1e-3


@dataclass
class BottleneckConfig(PeftConfig):
    """A bottleneck after some modules: ``h + s(h)`` with ``s(h) = U f(D h + d) + u`` in place of their output h.

    D is (size, out), U (out, size); U and u start at zero, so that training starts from the base exactly, and D is
    normal with a deviation of 1e-3.

    Args:
        size: width of the bottleneck, 1 or more.
        placement: ``houlsby``: after the last projection of attention and of the feed-forward block, before the
            residual sum; ``pfeiffer``: after that of the feed-forward block alone.
        activation: f, by its name in transformers.
        dropout: of s(h), a share.
        target_modules: ends of names of the modules to follow; found by the placement where not given.
        modules_to_save: modules that are trained whole (a classifier's head).

    Raises:
        UserError: a size below 1, an unknown placement or activation; when the model is adapted, no module to follow,
            or one that is neither Linear nor Conv1D.

    Source: Houlsby et al. (arXiv 1902.00751), section 2; the placement after the feed-forward block alone: Pfeiffer et
    al. (arXiv 2005.00247), section 3. Layer norms are not trained here, as they are by Houlsby et al., and Pfeiffer's
    bottleneck stands before the residual sum too.
    """

    size: int = field(default=64, metadata={"help": "Width of the bottleneck."})
    placement: str = field(default="houlsby", metadata={"help": "houlsby or pfeiffer."})
    activation: str = field(default="gelu", metadata={"help": "Between the two matrices."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout of what is added, a share."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Ends of names of modules."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules that are trained whole."})

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        self.peft_type = Kind.BOTTLENECK
        if self.size < 1:
            raise UserError(f"BottleneckConfig(size={self.size}) is not possible: it must be 1 or more")
        if self.placement not in ("houlsby", "pfeiffer"):
            raise UserError(f"BottleneckConfig(placement={self.placement!r}) is unknown: use houlsby or pfeiffer")
        if self.activation not in ACT2FN:
            raise UserError(f"BottleneckConfig(activation={self.activation!r}) is no activation of transformers")


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A module that is followed by bottlenecks, those of the active adapters one after the other."""

    # An adapter's name stands just before a parameter's own, where PEFT looks for it to load it by another name.
    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    base_layer: nn.Module
    bottleneck_down: Any  # ModuleDicts, which mypy takes for tensors or modules
    bottleneck_up: Any

    def __init__(self, base_layer: nn.Module, adapter: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.configs: dict[str, BottleneckConfig] = {}
        self._disable_adapters, self._active_adapter = False, adapter
        self.merged_adapters: list[str] = []
        self.update_layer(adapter, config)

    def update_layer(self, adapter: str, config: BottleneckConfig) -> None:
        """Add an adapter, zero at first."""
        base: Any = self.base_layer
        layer: Any = self  # with PEFT's own methods, which have no types
        width = int(base.nf if isinstance(base, Conv1D) else base.out_features)
        down, up = nn.Linear(width, config.size), nn.Linear(config.size, width)
        nn.init.normal_(down.weight, std=START_DEVIATION)
        for start in (down.bias, up.weight, up.bias):
            nn.init.zeros_(start)
        self.bottleneck_down[adapter], self.bottleneck_up[adapter] = down, up
        self.configs[adapter] = config
        layer._move_adapter_to_device_of_base_layer(adapter)
        layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output with what the bottlenecks add."""
        hidden: Tensor = self.base_layer(x, *args, **kwargs)
        active: list[str] = [] if self.disable_adapters else list(self.active_adapters)  # type: ignore[arg-type]
        for adapter in active:
            if adapter in self.bottleneck_down:
                hidden = hidden + self._added(hidden, adapter).to(hidden.dtype)
        return hidden

    def _added(self, hidden: Tensor, adapter: str) -> Tensor:
        down, up, config = self.bottleneck_down[adapter], self.bottleneck_up[adapter], self.configs[adapter]
        inner = ACT2FN[config.activation](down(hidden.to(down.weight.dtype)))
        return nn.functional.dropout(up(inner), config.dropout, self.training)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's hook; there is nothing that the weight could take up.

        Raises:
            UserError: always.
        """
        raise UserError("a bottleneck is not linear and cannot be merged into a weight: keep it as an adapter")


class BottleneckModel(BaseTuner):
    """PEFT's tuner for :class:`BottleneckConfig`."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012 - PEFT's own form

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's hook: find the modules to follow where none are named."""
        config = self.peft_config[adapter_name]
        if config.target_modules is None:
            config.target_modules = sorted(_found(model, config.placement))
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _create_and_replace(
        self,
        config: BottleneckConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, config)
            return
        if not isinstance(target, nn.Linear | Conv1D):
            raise UserError(f"{current_key} is a {type(target).__name__}: a bottleneck follows Linear and Conv1D only")
        made = BottleneckLayer(target, adapter_name, config)
        if adapter_name not in self.active_adapters:
            made.requires_grad_(False)
        self._replace_module(parent, target_name, made, target)


def _found(model: nn.Module, placement: str) -> Iterator[str]:
    """Full names of the modules that close a block.

    Raises:
        UserError: there are none.
    """
    ends = FEED_FORWARD if placement == "pfeiffer" else (*ATTENTION, *FEED_FORWARD)
    names = [
        name
        for name, module in base_modules(model)
        if isinstance(_own(module), nn.Linear | Conv1D) and re.search(r"\.\d+\.", name)  # a layer's, and no head's
    ]
    attention = {name for name in names if name.endswith(tuple(f".{end}" for end in ATTENTION))}
    closing = {name for name in names if name.endswith(tuple(f".{end}" for end in ends))}
    found = closing - attention if placement == "pfeiffer" else closing
    if not found:
        raise UserError(
            f"no module of {type(model).__name__} is known to close a block, which a {placement} bottleneck follows: "
            "name them in target_modules"
        )
    yield from found


def _own(module: nn.Module) -> nn.Module:
    """A module as it was before it had adapters."""
    inner: nn.Module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return inner


register(Kind.BOTTLENECK, BottleneckConfig, BottleneckModel)
