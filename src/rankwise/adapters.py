"""An adapter from its own folder, on the base that it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import rankwise.ranks  # noqa: F401  # so that PEFT knows SoRA's adapters
from rankwise.analysis.ranks import CONFIG
from rankwise.directions import load_checkpoint
from rankwise.directions.checkpoint import SIDE_FILE
from rankwise.directions.model_files import model_class
from rankwise.errors import UserError
from rankwise.files import check_folder
from rankwise.models import loading, quiet_libraries, resolve
from rankwise.models.base import load_base
from rankwise.peft_bridge import adapter_weights
from rankwise.peft_bridge.patterns import check_patterns
from rankwise.peft_bridge.targets import check_sizes
from rankwise.reading import open_tensors, read_json

# What an adapter's own tensors have in their names; all others are of a trained head, or biases.
OWN = re.compile(r"\.lora_|vera_|\.bottleneck_|prompt_embeddings")

# Where the configs of some of PEFT's kinds name further files, which PEFT would load: pickles and models with code too.
ELSEWHERE = ("adapters", "shadow_model", "prompt_tuning_init_state_dict_path")


def load_adapter_folder(folder: Path, model: str | None = None) -> PeftModel:
    """The base with a saved adapter: plain LoRA, SoRA, or a checkpoint or start of MiLoRA.

    Args:
        folder: that ``save_pretrained``, a trainer or ``rankwise init`` wrote.
        model: the base: a folder, a hub id or ``embedded``; the one that the adapter names where it is not given.

    Raises:
        UserError: the folder holds no adapter or a damaged one, names no base, or the base cannot be loaded or is
            another.
    """
    quiet_libraries()
    check_folder(folder)
    settings = _settings(folder)
    place = model or settings.get("base_model_name_or_path")
    if not place:
        raise UserError(f"{folder / CONFIG} names no base model: give it with --model")
    base = _base(place, settings.get("task_type"), folder)
    check_patterns(settings, [name for name, _ in base.named_modules()], f"{folder / CONFIG}: ")
    check_sizes(base, settings, f"{folder / CONFIG}: ")
    if (folder / SIDE_FILE).is_file():
        return load_checkpoint(base, folder)
    with loading(f"{folder} on {place}", "save the adapter again, or give its base with --model"):
        return PeftModel.from_pretrained(base, folder)


def _settings(folder: Path) -> dict[str, Any]:
    adapter_weights(folder)
    found: dict[str, Any] = read_json(folder / CONFIG, dict, "save the adapter again")
    if named := next((name for name in ELSEWHERE if found.get(name) not in (None, "mirror")), None):
        raise UserError(f"{folder / CONFIG} has {named} {found[named]!r} loaded too: take an adapter that stands alone")
    return found


def _base(place: str, task: str | None, folder: Path) -> PreTrainedModel:
    """The base in the dtype of its files, as the adapter's task has it, else as its own config has it."""
    options: dict[str, Any] = {}
    if task == "SEQ_CLS":  # the base's own head, of other classes, gives way to the adapter's
        options = {"num_labels": _labels(folder)}
    with loading(f"model {place}", "give the base with --model"):
        where = resolve(place)
        kinds = {
            "CAUSAL_LM": AutoModelForCausalLM,
            "SEQ_CLS": AutoModelForSequenceClassification,
            "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
        }
        kind = kinds.get(task or "") or model_class(AutoConfig.from_pretrained(where, trust_remote_code=False), place)
        base = load_base(kind, where, head=task == "SEQ_CLS", dtype="auto", **options)
    return base.eval()


def _labels(folder: Path) -> int:
    """Classes of a trained head: the fewest rows of its matrices, where it has several layers."""
    with open_tensors(adapter_weights(folder), "save the adapter again") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys() if not OWN.search(key)]
    rows = [shape[0] for shape in shapes if len(shape) == 2]
    if not rows:
        raise UserError(
            f"{folder} is a classifier's and holds no trained head: load it yourself and use rankwise.export"
        )
    return int(min(rows))
