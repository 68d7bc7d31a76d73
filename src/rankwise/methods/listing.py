"""Every method as a row: its paper, what it trains of a model, and whether it merges."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import PeftModel
from rich.table import Table
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from rankwise.errors import UserError
from rankwise.methods.models import with_adapter
from rankwise.models import loading, quiet_libraries, resolve
from rankwise.recipes import make_recipe
from rankwise.schema import METHODS, Recipe

# Of a start that is computed from the weights, the parameters are as many without it.
WITHOUT_START: dict[str, dict[str, Any]] = {
    "milora": {"kind": "lora"},
    "sora": {"part": None},
    "prompt": {"start": "random"},
}

MODELS: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
}
DECODERS = ("ForCausalLM", "LMHeadModel")  # ends of their classes' names


def method_rows(path: str, classes: int | None = None) -> list[dict[str, Any]]:
    """Each method with its defaults, on a model of which only the shapes are made.

    Args:
        path: of the model: a folder, a hub id or ``embedded``.
        classes: of a classifier; a language model where None.

    Returns:
        A row each: ``name``, ``title``, ``paper``, ``parameters`` that are trained (None where the model has nothing
        that the method trains, then ``reason`` says why), ``share`` of the model's own, and ``merges``.

    Raises:
        UserError: there is no such model, it is no language model, or ``classes`` is below 2.
    """
    if classes is not None and classes < 2:
        raise UserError(f"--classes {classes} is not possible: it must be 2 or more")
    quiet_libraries()
    config = _config(path, classes)
    rows = []
    for name, method in METHODS.items():
        row: dict[str, Any] = {"name": name, "title": method.title, "paper": method.paper, "merges": method.merges}
        model = _shapes(config, classes)
        total = model.num_parameters()
        try:
            trained = _trained(model, name, _task_type(config, classes))
            row |= {"parameters": trained, "share": trained / total}
        except UserError as error:
            row |= {"parameters": None, "share": None, "reason": str(error)}
        rows.append(row)
    return rows


def method_table(rows: list[dict[str, Any]]) -> Table:
    """The rows for a terminal."""
    table = Table("name", "method", "arXiv", box=None)
    for heading in ("trained parameters", "share"):
        table.add_column(heading, justify="right")
    table.add_column("merges")
    for row in rows:
        count = "-" if row["parameters"] is None else f"{row['parameters']:,}"
        share = "-" if row["share"] is None else f"{100 * row['share']:.2f} %"
        merges = "yes" if row["merges"] else "no"
        table.add_row(row["name"], row["title"], row["paper"] or "-", count, share, merges)
    reasons = [f"{row['name']}: {row['reason']}" for row in rows if "reason" in row]
    table.caption = "\n".join(reasons) or None
    table.caption_justify = "left"
    return table


def _config(path: str, classes: int | None) -> Any:
    options = {} if classes is None else {"num_labels": classes}
    with loading(f"model {path}"):
        config = AutoConfig.from_pretrained(resolve(path), trust_remote_code=False, **options)
    language = config.is_encoder_decoder or any(
        name.endswith(DECODERS) for name in config.architectures or ["ForCausalLM"]
    )
    if classes is None and not language:
        raise UserError(f"model {path} ({config.model_type}) is no decoder: say --classes to count for a classifier")
    return config


def _task_type(config: Any, classes: int | None) -> str:
    if classes is not None:
        return "SEQ_CLS"
    return "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"


def _shapes(config: Any, classes: int | None) -> PreTrainedModel:
    kind = MODELS[_task_type(config, classes)]
    with torch.device("meta"):
        model: PreTrainedModel = kind.from_config(config, trust_remote_code=False)
    return model


def _trained(base: PreTrainedModel, name: str, task_type: str) -> int:
    """Parameters that a method trains, a classifier's head among them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: PeftModel = with_adapter(base, _recipe(name), task_type)
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def _recipe(name: str) -> Recipe:
    settings = dict(METHODS[name].settings)
    settings |= WITHOUT_START.get(settings["kind"], {})
    settings.pop("part", None)
    return make_recipe(
        {"adapter": settings, "data": {"kind": "text", "train": "-"}, "stages": [{"kind": "sft"}], "output": "-"}
    )
