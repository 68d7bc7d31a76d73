"""Which model is the reference, and how it stands in for the policy while something is scored."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rankwise.errors import UserError, nearest
from rankwise.likelihood import unwrapped
from rankwise.peft_bridge import active_adapter

SOURCES = ("start", "base", "none")


def choose_reference(
    policy: nn.Module, source: str = "start", adapter: str | None = None, ref_model: nn.Module | None = None
) -> Reference | None:
    """The reference that the user asks for; None where there is to be none (``none``).

    Args:
        policy: the model that is trained, outside any wrapper of DistributedDataParallel and its like.
        source: ``start`` (the policy as it is when training begins: after supervised fine-tuning, as in the paper of
            softmax-DPO), ``base`` (the policy with its adapter disabled) or ``none``.
        adapter: name of another adapter of the policy, which takes the place of ``source``.
        ref_model: a separate model, which takes the place of ``source``.

    Raises:
        UserError: two references; ``base`` or an adapter's name without a PEFT model; an unknown adapter, or the one
            that is trained; an adapter that is merged, or weights of the base that are trained beside it; a separate
            model with another vocabulary, or one that shares trained weights with the policy.
    """
    if source not in SOURCES:
        raise UserError(f"reference={source!r} is unknown: {', '.join(SOURCES)} are possible")
    given = [] if source == "start" else [f"reference={source!r}"]
    given += [f"reference_adapter={adapter!r}"] if adapter is not None else []
    given += ["ref_model"] if ref_model is not None else []
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are {len(given)} references: give one of them")
    if ref_model is not None:
        return ModelReference(policy, ref_model)
    if adapter is not None:
        return AdapterReference(policy, adapter)
    if source == "none":
        return None
    return BaseReference(policy) if source == "base" else StartReference(policy)


class Reference(ABC):
    """A model that is there while :meth:`active` is, with everything as it was afterwards.

    Attributes:
        policy: the model that is trained.
    """

    def __init__(self, policy: nn.Module) -> None:
        self.policy = policy

    @property
    def model(self) -> nn.Module:
        """The module that is called: the policy's own, unless the reference is a separate one."""
        return self.policy

    @property
    @abstractmethod
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters of :attr:`model` that are on in the reference."""

    @abstractmethod
    def _in_place(self) -> AbstractContextManager[None]:
        """Within it :attr:`model` computes the reference."""

    def keep(self) -> int:
        """Keep what the reference would lose by a step of training; returns the bytes that it takes.

        To be called where the reference is needed once the policy has moved: for negatives that are drawn while
        training goes on. Only ``start`` has something to keep; called again, it is what the policy is then.

        Raises:
            UserError: the weights are spread over processes, or packed.
        """
        return 0

    @contextlib.contextmanager
    def active(self) -> Iterator[nn.Module]:
        """The reference, in evaluation mode and without gradients.

        When the block is left, by an exception too, weights, adapters, modes and which weights are trained are as they
        were, to the bit. A graph that was recorded before may still be differentiated after.

        Raises:
            UserError: the model was changed so that its start cannot be put back.
        """
        with _as_before(self.model), self._in_place(), torch.no_grad():
            self.model.eval()
            yield self.model


class StartReference(Reference):
    """The policy as it was when :meth:`keep` was called; until then, as it is.

    What is kept is a copy of the trained weights and of all buffers of floating-point numbers: those of the adapter
    alone where nothing else is trained. In use they change places with those of the policy; nothing is copied.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__(policy)
        self._kept: dict[str, Tensor] = {}
        self._layers: list[tuple[nn.Module, str, nn.Module]] = []

    @property
    def adapters(self) -> tuple[str, ...]:
        """The active ones."""
        return _active_adapters(self.policy)

    def keep(self) -> int:
        """As :meth:`Reference.keep`."""
        moving: dict[str, Tensor] = {n: value for n, value in self.policy.named_parameters() if value.requires_grad}
        moving |= {name: value for name, value in self.policy.named_buffers() if value.is_floating_point()}
        for name, tensor in moving.items():
            _check_plain(name, tensor)
        self._kept = {name: tensor.detach().clone() for name, tensor in moving.items()}
        self._layers = [
            (self.policy.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], layer)
            for name, layer in self.policy.named_modules()
            if isinstance(layer, BaseTunerLayer)
        ]
        return sum(tensor.nbytes for tensor in self._kept.values())

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        self._exchange_layers()
        try:
            live = self._live()
            self._exchange(live)
            try:
                yield
            finally:
                self._exchange(live)
        finally:
            self._exchange_layers()

    def _exchange_layers(self) -> None:
        """Exchange adapted layers with what stands in their place: their base, where they lost their adapter."""
        for index, (parent, name, layer) in enumerate(self._layers):
            self._layers[index] = (parent, name, getattr(parent, name))
            setattr(parent, name, layer)

    def _exchange(self, live: dict[str, Tensor]) -> None:
        for name, tensor in live.items():
            tensor.data, self._kept[name] = self._kept[name], tensor.data

    def _live(self) -> dict[str, Tensor]:
        """The tensors of the policy that were kept; ranks may have changed, names and dimensions not."""
        found = dict(self.policy.named_parameters()) | dict(self.policy.named_buffers())
        for name, kept in self._kept.items():
            if name not in found or found[name].ndim != kept.ndim:
                what = "has another form" if name in found else "is gone"
                raise UserError(
                    f"{name} {what} since the start of the training was kept, so that reference='start' cannot be put "
                    "back: keep it once the model is wrapped and whole, or take reference='base', another adapter "
                    "(reference_adapter) or ref_model"
                )
            _check_plain(name, found[name])
            self._kept[name] = kept.to(found[name].device)
        return {name: found[name] for name in self._kept}


class BaseReference(Reference):
    """The policy with its adapter disabled."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__(policy)
        if not isinstance(policy, PeftModel):
            raise UserError("reference 'base' needs a model with an adapter to disable: use 'start' or give ref_model")
        _check_apart(policy, "reference='base'")

    @property
    def adapters(self) -> tuple[str, ...]:
        """None."""
        return ()

    def _in_place(self) -> AbstractContextManager[None]:
        disabled: AbstractContextManager[None] = _peft(self.policy).disable_adapter()
        return disabled


class AdapterReference(Reference):
    """The policy with another of its adapters in place of the one that is trained."""

    def __init__(self, policy: nn.Module, adapter: str) -> None:
        super().__init__(policy)
        trained, known = active_adapter(policy), _peft(policy).peft_config
        if adapter not in known:
            raise UserError(f"reference_adapter={adapter!r} is no adapter of the model: {nearest(adapter, known)}")
        if adapter == trained:
            raise UserError(
                f"reference_adapter={adapter!r} is the adapter that is trained, and would move with it: leave it out "
                "for the model as it is at the start (reference='start'), or load that adapter again by another name"
            )
        _check_apart(policy, f"reference_adapter={adapter!r}")
        self.adapter = adapter

    @property
    def adapters(self) -> tuple[str, ...]:
        """That one."""
        return (self.adapter,)

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        trained = active_adapter(self.policy)
        try:
            _peft(self.policy).set_adapter(self.adapter)
            yield
        finally:
            _peft(self.policy).set_adapter(trained)


class ModelReference(Reference):
    """A separate model: put into evaluation mode, its gradients off, and moved to the policy's device for good."""

    def __init__(self, policy: nn.Module, ref_model: nn.Module) -> None:
        super().__init__(policy)
        self._other = ref_model
        sizes = [int(unwrapped(model).config.get_text_config().vocab_size) for model in (ref_model, policy)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"ref_model has a vocabulary of {sizes[0]:,} tokens and the model one of {sizes[1]:,}, so that their "
                "log-probabilities are not of the same thing: give a ref_model with the same tokenizer"
            )
        trained = {id(value) for value in policy.parameters() if value.requires_grad}
        if shared := [name for name, value in ref_model.named_parameters() if id(value) in trained]:
            raise UserError(
                f"ref_model shares {len(shared)} trained weights with the model ({shared[0]}), and would move with it "
                "(get_peft_model changes the model that it is given): leave ref_model out and take reference='base' or "
                "'start', or load the model a second time"
            )
        ref_model.requires_grad_(False).eval()

    @property
    def model(self) -> nn.Module:
        """The separate one."""
        return self._other

    @property
    def adapters(self) -> tuple[str, ...]:
        """Those that are active in it."""
        return _active_adapters(self._other)

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        device = next(self.policy.parameters()).device
        if next(self._other.parameters()).device != device:
            self._other.to(device)
        yield


@contextlib.contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is in its own mode, and each weight takes gradients or not, as before."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [(value, value.requires_grad) for value in model.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for value, required in trained:
            value.requires_grad = required


def _check_apart(policy: nn.Module, what: str) -> None:
    """Refuse a policy whose reference would move with it: with trained weights that no adapter owns, or merged ones."""
    for name, layer in policy.named_modules():
        if isinstance(layer, BaseTunerLayer) and layer.merged:
            raise UserError(
                f"{name}: {', '.join(layer.merged_adapters)} is merged into its weight, so that {what} is not to be "
                "had: call unmerge_adapter() first"
            )
    if _peft(policy).active_peft_config.is_prompt_learning:
        return
    with _as_before(policy):
        trained = {id(value) for value in policy.parameters() if value.requires_grad}
        layers = any(isinstance(module, BaseTunerLayer) for module in policy.modules())  # PEFT fails without any
        with _peft(policy).disable_adapter() if layers else contextlib.nullcontext():
            left = [name for name, value in policy.named_parameters() if value.requires_grad and id(value) in trained]
    if left:
        raise UserError(
            f"{left[0]} is trained and belongs to no adapter ({len(left)} such weights; bias='all' or 'lora_only' does "
            f"that), so that {what} would move with the model: take reference='start', or give ref_model"
        )


def _active_adapters(model: nn.Module) -> tuple[str, ...]:
    if isinstance(model, PeftModel):
        return tuple(model.active_adapters)
    return (active_adapter(model),) if getattr(model, "peft_config", None) else ()


def _check_plain(name: str, tensor: Tensor) -> None:
    if type(tensor.data) is not Tensor:
        raise UserError(
            f"{name} is a {type(tensor.data).__name__}, spread over processes or packed, of which reference='start' "
            "cannot be kept while training goes on: take reference='base', another adapter (reference_adapter) or "
            "ref_model, or negatives that are drawn before training"
        )


def _peft(model: nn.Module) -> Any:
    """The same model, as PEFT's type, which mypy does not know."""
    return model
