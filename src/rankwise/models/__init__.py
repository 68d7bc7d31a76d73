"""The base model: the small one that ships here, one from a folder, or one from a hub."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

from rankwise.errors import UserError, cut, system_failure
from rankwise.models.base import load_base
from rankwise.models.config import check_config
from rankwise.processes import world_size
from rankwise.schema import EMBEDDED, ModelSettings

EMBEDDED_FOLDER = Path(__file__).parent / "reviews"


def quiet_libraries() -> None:
    """Keep transformers' own bars and notices out of ours."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # PEFT takes the masks and the layers of rank 0 of an AdaLoRA adapter for mistakes.
    warnings.filterwarnings("ignore", message=r"The following rank_pattern keys did not match .*\.lora_E'")
    warnings.filterwarnings("ignore", message=r"Adapter '.*': \d+ LoRA tensor\(s\) have invalid shape")


def resolve(path: str) -> str:
    """The place of a model: the shipped one's folder for ``embedded``, else as given.

    Raises:
        UserError: the path looks like a folder and is none, or its config.json has another form or absurd sizes.
    """
    if path == EMBEDDED:
        return str(EMBEDDED_FOLDER)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    # Not by Path, which fails for a user who is not there and for names that are too long.
    folder = os.path.expanduser(path)  # noqa: PTH111
    if looks_local and not os.path.isfile(f"{folder}/config.json"):  # noqa: PTH113
        place = cut(path, 300)
        raise UserError(f"model.path {place}: no model's folder (it has no config.json); give a folder or a hub id")
    if not os.path.isdir(folder):  # noqa: PTH112
        return path
    check_config(Path(folder))
    return folder


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UserError: it cannot be loaded.
    """
    place = resolve(path)
    with loading(f"model.path {path}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    return tokenizer


def load_language_model(settings: ModelSettings) -> PreTrainedModel:
    """A causal language model, read from safetensors; on an accelerator where there is one.

    With ``settings.shard`` each of several processes, all of which call this, holds a part of every weight.

    Raises:
        UserError: it cannot be loaded.
    """
    return _load(AutoModelForCausalLM, settings)


def load_sequence_model(settings: ModelSettings) -> PreTrainedModel:
    """An encoder-decoder model, otherwise as :func:`load_language_model`.

    Raises:
        UserError: it cannot be loaded.
    """
    return _load(AutoModelForSeq2SeqLM, settings)


def load_classifier(settings: ModelSettings, labels: list[str], padding: int) -> PreTrainedModel:
    """The model with a new classification head over ``labels``; otherwise as :func:`load_language_model`.

    Raises:
        UserError: it cannot be loaded.
    """
    names = dict(enumerate(labels))
    model = _load(
        AutoModelForSequenceClassification,
        settings,
        head=True,
        id2label=names,
        label2id={n: i for i, n in names.items()},
    )
    model.config.pad_token_id = padding
    return model


def context_limit(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, virtual: int = 0) -> int:
    """Most tokens of a row: as wanted, else the model's own limit, but at most 2048, without virtual ones.

    Args:
        settings: of the model.
        tokenizer: the model's.
        virtual: tokens that an adapter puts before each row.

    Raises:
        UserError: more is wanted than the model has positions for, or there is no such model.
    """
    with loading(f"model.path {settings.path}"):
        config = AutoConfig.from_pretrained(resolve(settings.path), trust_remote_code=False).get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048
        # A tokenizer knows the limit of models whose first positions are taken (RoBERTa); else it says 1e30.
        limit = min(int(positions), int(tokenizer.model_max_length))
    if virtual >= limit:
        raise UserError(f"adapter.tokens {virtual} leaves no room in the model's {limit} positions: lower it")
    if settings.context is not None and settings.context > limit - virtual:
        left = f"{limit}" if not virtual else f"{limit} less the adapter's {virtual}"
        given = f"model.context {settings.context}"
        raise UserError(f"{given} is more than the model's {left}: give {limit - virtual} or fewer")
    return settings.context or min(limit, 2048) - virtual


def _load(kind: type, settings: ModelSettings, head: bool = False, **options: object) -> PreTrainedModel:
    place = resolve(settings.path)
    spread = settings.shard and world_size() > 1
    if spread:
        options["distributed_config"] = DistributedConfig(fsdp_size=world_size())
    with loading(f"model.path {settings.path}"):
        own = {} if settings.dropout is None else _dropouts(place, settings.dropout)
        options |= dict.fromkeys(own, settings.dropout)
        model = load_base(kind, place, head, dtype=getattr(torch, settings.dtype), **options)
        model.config.update(own)  # it is how this training runs, and no part of a model that is saved
    return model if spread else model.to("cuda" if torch.cuda.is_available() else "cpu")


def _dropouts(place: str, share: float) -> dict[str, float]:
    """The model's own settings of dropout, by the names that its family has for them."""
    config = AutoConfig.from_pretrained(place, trust_remote_code=False).to_dict()
    named = {name: value for name, value in config.items() if re.search("dropout|pdrop", name)}
    found = {name: value for name, value in named.items() if type(value) in (int, float)}
    if not found:
        raise UserError(f"model.dropout {share}: the model's config.json has no dropout: leave it out")
    return found


@contextmanager
def loading(what: str, remedy: str = "") -> Iterator[None]:
    """Have a model's files read by a library, which raises anything at all where one is broken.

    Args:
        what: is read, as messages name it.
        remedy: said at the end, where there is one.

    Raises:
        UserError: the block raises an error of the library's, but for one of the system's (a full disk, say).
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if system_failure(error) is not None:  # of this machine, not of the files
            raise
        end = f"; {remedy}" if remedy else ""
        raise UserError(f"{cut(what, 600)} cannot be loaded: {_reason(error)}{end}") from error


def _reason(error: Exception) -> str:
    """Why, in one line: what the library says, but for its advice to run a model's code."""
    said = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in said:
        return "it needs Python code from its own files, which is never run: take a model that transformers has"
    return cut(said, 300)
