"""The base model: the small one that ships here, one from a folder, or one from a hub."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from rankwise.errors import UserError
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
        UserError: the path looks like a folder and is none.
    """
    if path == EMBEDDED:
        return str(EMBEDDED_FOLDER)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    folder = Path(path).expanduser()
    if looks_local and not (folder / "config.json").is_file():
        raise UserError(f"model.path {path}: no model's folder (it has no config.json); give a folder or a hub id")
    return str(folder) if folder.is_dir() else path


def reason(error: Exception) -> str:
    """Why a model cannot be loaded, in one line: what the library says, but for its advice to run a model's code."""
    said = " ".join(str(error).split())
    if "trust_remote_code" in said:
        return "it needs Python code from its own files, which is never run: take a model that transformers has"
    return said[:300]


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UserError: it cannot be loaded.
    """
    place = resolve(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unavailable(path, error) from error
    return tokenizer


def load_language_model(settings: ModelSettings) -> PreTrainedModel:
    """A causal language model, read from safetensors; on an accelerator where there is one.

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
        AutoModelForSequenceClassification, settings, id2label=names, label2id={n: i for i, n in names.items()}
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
    try:
        whole = AutoConfig.from_pretrained(resolve(settings.path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unavailable(settings.path, error) from error
    config = whole.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048
    # A tokenizer knows the limit of models whose first positions are taken (RoBERTa); where it does not, it says 1e30.
    limit = min(int(positions), int(tokenizer.model_max_length))
    if virtual >= limit:
        raise UserError(f"adapter.tokens {virtual} leaves no room in the model's {limit} positions: lower it")
    if settings.context is not None and settings.context > limit - virtual:
        left = f"{limit}" if not virtual else f"{limit} less the adapter's {virtual}"
        given = f"model.context {settings.context}"
        raise UserError(f"{given} is more than the model's {left}: give {limit - virtual} or fewer")
    return settings.context or min(limit, 2048) - virtual


def _load(kind: type, settings: ModelSettings, **options: object) -> PreTrainedModel:
    try:
        model: PreTrainedModel = kind.from_pretrained(  # type: ignore[attr-defined]
            resolve(settings.path),
            dtype=getattr(torch, settings.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise _unavailable(settings.path, error) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _unavailable(path: str, error: Exception) -> UserError:
    return UserError(f"model.path {path} cannot be loaded: {reason(error)}")
