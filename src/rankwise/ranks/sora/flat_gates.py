"""All gates of one adapter as one vector, wherever the model keeps them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.errors import UserError
from rankwise.peft_bridge import adapted_layers
from rankwise.processes import is_spread
from rankwise.ranks.sora.layer import direction_size, gates


class FlatGates:
    """The gates of an adapter, read and written as one vector.

    Attributes:
        names: of their layers.
        parameters: the gates, by layer.
        lengths: how many each layer has.
        sizes: parameters of the direction of each gate.

    Raises:
        UserError: the adapter is not SoRA.
    """

    def __init__(self, model: nn.Module, adapter: str) -> None:
        self.model, self.adapter = model, adapter
        self.find()

    def find(self) -> None:
        """Look the gates up again: after directions were cut, or the model was moved."""
        layers = dict(adapted_layers(self.model, self.adapter))
        found = gates(self.model, self.adapter)
        self.layers = [layers[name] for name in found]
        self.names, self.parameters = list(found), list(found.values())
        self.lengths = [gate.numel() for gate in self.parameters]
        self.device = self.parameters[0].device
        sizes = torch.tensor([direction_size(layer, self.adapter) for layer in self.layers], device=self.device)
        counts = torch.tensor(self.lengths, device=self.device)
        self.sizes: Int[Tensor, " gates"] = sizes.repeat_interleave(counts)

    def changed(self) -> bool:
        """Whether directions were cut, or the model was moved, since the gates were looked up."""
        lengths = [gate.numel() for gate in self.parameters]
        return lengths != self.lengths or self.parameters[0].device != self.device

    def read(self) -> Float[Tensor, " gates"]:
        """The gates, in float32 at least."""
        dtype = torch.promote_types(self.parameters[0].dtype, torch.float32)
        return torch.cat([gate.detach().to(self.device, dtype) for gate in self.parameters])

    def write(self, flat: Float[Tensor, " gates"]) -> None:
        """Set the gates."""
        torch._foreach_copy_([gate.detach() for gate in self.parameters], list(torch.split(flat, self.lengths)))

    def by_layer(self, flat: Tensor) -> dict[str, Tensor]:
        """A vector with one entry for each gate, by the names of layers."""
        return dict(zip(self.names, torch.split(flat, self.lengths), strict=True))

    def parameters_left(self, flat: Float[Tensor, " gates"]) -> int:
        """Parameters of all directions whose gate is open."""
        return int(self.sizes[flat != 0].sum())

    def check(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that could not train these gates.

        Raises:
            UserError: it lacks some, they are not trained, spread over processes, or too narrow for small steps.
        """
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, gate in zip(self.names, self.parameters, strict=True):
            if not gate.requires_grad:
                raise UserError(f"{name}: its gate is not trained: load the adapter with is_trainable=True")
            if is_spread(gate):
                raise UserError(
                    f"{name}: its gate is spread over processes, which each must see whole: leave the adapter out of "
                    "FSDP and ZeRO-3, or train with DDP"
                )
            if id(gate) not in known:
                raise UserError(
                    f"{name}: the optimizer does not have its gate: use rankwise.sora_optimizer, and DDP or FSDP2 in "
                    "place of DeepSpeed, which trains weights of its own"
                )
        self.check_dtype()

    def check_dtype(self) -> None:
        """Refuse gates in which a small threshold would be lost to rounding."""
        narrow = {gate.dtype for gate in self.parameters} - {torch.float32, torch.float64}
        if narrow:
            raise UserError(
                f"gates of {narrow.pop()} cannot be shrunk by small thresholds, which rounding undoes: leave the "
                "adapter in float32, and let autocast or the base have another dtype"
            )
