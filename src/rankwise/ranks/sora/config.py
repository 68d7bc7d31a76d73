"""The settings of SoRA."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import LoraConfig

from rankwise.directions.triplets import Part, check_part
from rankwise.errors import UserError
from rankwise.peft_bridge import Kind, check_alphas, check_config

MODES = ("proximal", "reference")


@dataclass
class SoraConfig(LoraConfig):
    """A ``peft.LoraConfig`` with a gate g on the r directions: ``h = W x + s B (g * (A x))``.

    Train with :func:`rankwise.sora_optimizer`, then :func:`rankwise.prune`. With a ``part`` the directions are those of
    a part of the weight's spectrum, as in :class:`rankwise.MiloraConfig`, and the layer computes ``W x + s (B diag(g) A
    - B0 diag(g) A0) x``: the base at the start, and again where g is zero.

    Args:
        r: the largest rank.
        threshold: of the proximal step after each optimizer step; 0 or more, in units of the gate.
        threshold_scaling: ``none`` (the threshold as it is, the xi of the paper's code) or ``learning_rate`` (times the
            gates' current learning rate: the threshold is the paper's lambda).
        l1: weight of the mean of |g|, over all gates there were at first, in the loss; 0 or more.
        target_parameters: a budget instead of a threshold: a number of parameters (A, B and gates) to keep. The
            threshold follows from it (see :class:`rankwise.ranks.Budget`); from then on the open gates are left alone.
            It is kept as ``budget``, since PEFT has another use for this name (a list, which is not available here).
        target_ratio: the same as a share of the parameters at first, above 0, at most 1.
        budget_by: share of the training after which a budget is met; above 0, at most 1.
        shrink_after: directions whose gate was zero for so many steps are cut out while training goes on; never where
            it is not given (they are then dropped by :func:`rankwise.prune`). In one process only.
        gate_init: ``normal`` (standard normal, as in the paper's code) or ``ones``.
            With a ``part``, ``ones`` lets every direction count as in MiLoRA.
        mode: ``proximal`` (the exact step) or ``reference`` (the paper's code; see ``published_step``).
        part: ``minor``, ``principal``, ``middle`` or ``random``: start from these directions of each weight; ``None``
            (default) for LoRA's own start.
        part_seed: of the draw where part is ``random``.
        lora_alpha: with a ``part`` it defaults to ``r``, else to PEFT's 8.
        initial_gates: filled in when a model is adapted, and saved: gates at first.
        initial_parameters: likewise: parameters at first.
        first_state_known: filled in when the config is saved; a model that is adapted anew counts anew.

    Raises:
        UserError: a value out of its range, or a setting of another LoRA variant (``use_dora``, say). When the model is
            adapted: a budget above what there is or below what can be left; and as for :class:`rankwise.MiloraConfig`.

    Source: SoRA (arXiv 2311.11696), section 3.
    """

    threshold: float = field(default=3e-4, metadata={"help": "Threshold of the proximal step, in units of the gate."})
    threshold_scaling: Literal["none", "learning_rate"] = field(
        default="none", metadata={"help": "none, or learning_rate: the threshold is multiplied by that of the gates."}
    )
    l1: float = field(default=10.0, metadata={"help": "Weight of mean |g| in the loss."})
    target_parameters: int | None = field(
        default=None, metadata={"help": "Parameters to keep, instead of a threshold."}
    )
    target_ratio: float | None = field(default=None, metadata={"help": "Share of the parameters to keep."})
    budget_by: float = field(default=0.5, metadata={"help": "Share of training after which the budget is met."})
    shrink_after: int | None = field(default=None, metadata={"help": "Steps after which a closed gate is cut out."})
    gate_init: Literal["normal", "ones"] = field(default="normal", metadata={"help": "normal or ones."})
    mode: Literal["proximal", "reference"] = field(default="proximal", metadata={"help": "proximal or reference."})
    lora_alpha: int | float | None = field(
        default=None, metadata={"help": "Scaling numerator; where it is not given, r with a part, else 8."}
    )
    part: Part | None = field(default=None, metadata={"help": "Part of the spectrum to start from; none for LoRA's."})
    part_seed: int = field(default=0, metadata={"help": "Seed of the draw where part is random."})
    budget: int | None = field(default=None, metadata={"help": "Filled in: parameters to keep."})
    initial_gates: int | None = field(default=None, metadata={"help": "Filled in: gates at first."})
    initial_parameters: int | None = field(default=None, metadata={"help": "Filled in: parameters at first."})
    first_state_known: bool = field(default=False, metadata={"help": "Filled in when saved: both are of this adapter."})

    def __post_init__(self) -> None:
        """Check the ranges."""
        self._take_budget()
        super().__post_init__()
        if self.ensure_weight_tying:
            raise UserError(
                "SoraConfig(ensure_weight_tying=True) is not available: tied modules would have other ranks"
            )
        for name in ("threshold", "l1"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < math.inf:
                raise UserError(f"SoraConfig({name}={value!r}) is not possible: it must be 0 or more")
        choices = {"gate_init": ("normal", "ones"), "mode": MODES, "threshold_scaling": ("none", "learning_rate")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"SoraConfig({name}={getattr(self, name)!r}) is unknown: {' or '.join(known)}")
        if self.mode == "reference" and (self.target_ratio or self.budget):
            raise UserError("SoraConfig(mode='reference') zeroes more than a budget asks for: take mode='proximal'")
        self._check_budget()
        check_config(self, starts=(True, False, "gaussian") if self.part is None else (True, False))
        self._check_part()
        self.peft_type = Kind.SORA

    def _take_budget(self) -> None:
        """Move a number of parameters to ``budget``."""
        number: Any = self.target_parameters
        if number is not None and not isinstance(number, list | tuple | set):
            if self.target_ratio is not None:
                raise UserError("SoraConfig(target_ratio=..., target_parameters=...) are two budgets: give one of them")
            self.budget, self.target_parameters = number, None

    def to_dict(self) -> dict[str, Any]:
        """What is saved: as PEFT's, and that the first state in it is that of the adapter beside it."""
        settings: dict[str, Any] = super().to_dict()
        return settings | {"first_state_known": self.initial_gates is not None}

    def parameters_to_keep(self) -> int | None:
        """The budget, once a model is adapted; None where there is none."""
        if self.target_ratio is not None and self.initial_parameters is not None:
            return int(self.target_ratio * self.initial_parameters)
        return self.budget

    def _check_budget(self) -> None:
        """Check the budget and the cut."""
        for name in ("target_ratio", "budget_by"):
            share = getattr(self, name)
            if not (name == "target_ratio" and share is None) and not (is_number(share) and 0 < share <= 1):
                raise UserError(f"SoraConfig({name}={share!r}) is not possible: it is a share, above 0 and at most 1")
        for name, number in {"target_parameters": self.budget, "shrink_after": self.shrink_after}.items():
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise UserError(f"SoraConfig({name}={number!r}) is not possible: it must be a whole number, 1 or more")

    def _check_part(self) -> None:
        """Check the part and fill in alpha."""
        if self.part is not None:
            check_part(self.part)
        if self.lora_alpha is None:
            self.lora_alpha = self.r if self.part is not None else LoraConfig.lora_alpha
        check_alphas(self)


def is_number(value: object) -> bool:
    """Whether a setting is a real number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)
