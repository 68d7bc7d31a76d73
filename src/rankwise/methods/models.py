"""A recipe's method on a base: made, saved after a stage, and loaded again."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import peft
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, VeraConfig
from peft.utils import set_peft_model_state_dict
from transformers import PreTrainedModel

from rankwise.directions import MiloraConfig
from rankwise.directions.basehash import check_base
from rankwise.directions.checkpoint import SIDE_FILE, read_side
from rankwise.directions.saving import live_hashes
from rankwise.errors import UserError
from rankwise.files import check_folder, new_folder
from rankwise.methods.bottleneck import BottleneckConfig
from rankwise.methods.in_place import load_whole, save_whole, train_all, train_biases, trains_all
from rankwise.methods.virtual_tokens import with_virtual_tokens
from rankwise.models import loading
from rankwise.peft_bridge import active_adapter, adapter_state, adapter_weights
from rankwise.peft_bridge.patterns import check_patterns
from rankwise.peft_bridge.targets import check_sizes
from rankwise.processes import held_whole
from rankwise.ranks import SoraConfig, match_ranks
from rankwise.reading import open_tensors
from rankwise.schema import (
    AdaloraSettings,
    AdapterSettings,
    BitfitSettings,
    BottleneckSettings,
    FullSettings,
    LoraSettings,
    MiloraSettings,
    PrefixSettings,
    PromptSettings,
    Recipe,
    SoraSettings,
    VeraSettings,
)

WHOLE_MODEL = "config.json"  # in a stage's folder that holds a whole model, beside its weights


def with_adapter(base: PreTrainedModel, recipe: Recipe, task_type: str, stage: Path | None = None) -> PeftModel:
    """The base with a new adapter as the recipe wants it, or with its own weights to be trained.

    Args:
        base: what the adapter is for.
        recipe: with the adapter's settings.
        task_type: PEFT's word for the task.
        stage: a saved stage that will be loaded, so that no start is computed which it would replace.

    Raises:
        UserError: the target modules match nothing, one of them cannot be adapted, the model has nothing that the
            method trains, or the stage was begun on another base.
    """
    settings = recipe.adapter
    if isinstance(settings, FullSettings):
        return train_all(base)
    if isinstance(settings, BitfitSettings):
        return train_biases(base, task_type)
    if isinstance(settings, PromptSettings | PrefixSettings):
        return with_virtual_tokens(base, adapter_config(settings, task_type, recipe.seed))
    check_sizes(base, settings.model_dump(), "adapter.")
    check_patterns(settings.model_dump(), [name for name, _ in base.named_modules()], "adapter.")
    try:
        made: PeftModel = peft.get_peft_model(base, stage_config(recipe, task_type, stage))
    except UserError:
        raise
    except (ValueError, TypeError) as error:  # PEFT's words for targets that match nothing, or that it cannot adapt
        place = "target_modules" if hasattr(settings, "target_modules") else "kind"
        raise UserError(f"adapter.{place} {getattr(settings, place)}: {error}") from error
    return made


def stage_config(recipe: Recipe, task_type: str, stage: Path | None = None) -> PeftConfig:
    """PEFT's config for a recipe's adapter, or for one into which a saved stage will be loaded."""
    if stage is not None and (stage / SIDE_FILE).is_file():
        return MiloraConfig.from_pretrained(stage)
    if stage is not None and isinstance(recipe.adapter, AdaloraSettings):
        with loading(f"{stage}", "run the stage again"):
            config = AdaLoraConfig.from_pretrained(stage)  # its rank_pattern says what the stage's weights fit
        config.inference_mode = False
        return config
    return adapter_config(recipe.adapter, task_type, recipe.seed)


def adapter_config(settings: AdapterSettings, task_type: str, seed: int) -> PeftConfig:
    """PEFT's config for a recipe's adapter settings.

    Raises:
        UserError: the method has no adapter, as it trains the base's own weights.
    """
    if isinstance(settings, LoraSettings):
        return _lora_config(settings, task_type, seed)
    if isinstance(settings, VeraSettings):
        return VeraConfig(
            r=settings.r,
            target_modules=_targets(settings.target_modules),
            projection_prng_key=seed,
            vera_dropout=settings.dropout,
            d_initial=settings.d_initial,
            task_type=task_type,
        )
    if isinstance(settings, BottleneckSettings):
        names = {field.name for field in dataclasses.fields(BottleneckConfig)}
        return BottleneckConfig(**settings.model_dump(include=names), task_type=task_type)
    if isinstance(settings, PromptSettings):
        start = "SAMPLE_VOCAB" if settings.start == "vocabulary" else "RANDOM"
        return PromptTuningConfig(num_virtual_tokens=settings.tokens, prompt_tuning_init=start, task_type=task_type)
    if isinstance(settings, PrefixSettings):
        return PrefixTuningConfig(
            num_virtual_tokens=settings.tokens, prefix_projection=settings.projection, task_type=task_type
        )
    raise UserError(
        f"adapter.kind {settings.kind} trains the model's own weights: it cannot be one of several adapters"
    )


def _lora_config(settings: LoraSettings, task_type: str, seed: int) -> LoraConfig:
    if isinstance(settings, AdaloraSettings):
        return AdaLoraConfig(
            target_r=settings.r,
            init_r=settings.first_rank,
            deltaT=settings.every,
            beta1=settings.beta1,
            beta2=settings.beta2,
            orth_reg_weight=settings.orthogonality,
            total_step=1,  # not known yet: the stage lays its schedule over its steps
            lora_alpha=settings.alpha or 2 * settings.first_rank,
            lora_dropout=settings.dropout,
            target_modules=_targets(settings.target_modules),
            task_type=task_type,
        )
    common: dict[str, Any] = {
        "r": settings.r,
        "target_modules": _targets(settings.target_modules),
        "lora_dropout": settings.dropout,
        "use_rslora": settings.use_rslora,
        "task_type": task_type,
    }
    if isinstance(settings, SoraSettings):
        own = settings.model_dump(include=set(SoraSettings.__annotations__) - {"kind", "gate_lr"})
        alpha = settings.alpha or (settings.r if settings.part else 2 * settings.r)
        return SoraConfig(**common, **own, lora_alpha=alpha, part_seed=seed)
    common["use_dora"] = settings.use_dora
    if isinstance(settings, MiloraSettings):
        own = settings.model_dump(include={"part", "cache"})
        return MiloraConfig(**common, **own, lora_alpha=settings.alpha, part_seed=seed)
    return LoraConfig(**common, lora_alpha=settings.alpha or 2 * settings.r)


def _targets(given: str | list[str]) -> str | list[str]:
    return given if isinstance(given, str) else list(given)


def save_stage(model: PeftModel, folder: Path) -> None:
    """Save what is trained, as it is, replacing the folder in one step."""
    with new_folder(folder) as made:
        if trains_all(model):
            save_whole(model, made)
        else:
            model.save_pretrained(made, state_dict=held_whole(model))


def load_stage(model: PeftModel, folder: Path) -> None:
    """Put the weights of a saved stage into the model's adapter, or into the model where the stage holds a whole one.

    Raises:
        UserError: the stage is damaged, was begun on another base, or its tensors do not fit.
    """
    check_folder(folder)
    if (folder / WHOLE_MODEL).is_file():
        load_whole(model, folder)
        return
    adapter = active_adapter(model)
    if (folder / SIDE_FILE).is_file():
        check_base(read_side(folder).base, live_hashes(model, adapter))
    match_ranks(model, folder)
    with open_tensors(adapter_weights(folder), "run the stage again") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MiLoRA's of an adapter that was not loaded yet
        wanted = adapter_state(model, adapter)
    if missing := wanted.keys() - tensors:
        raise UserError(f"{folder} does not fit the model: it lacks {min(missing)}: run the stage again")
    with loading(f"the adapter in {folder}", "run the stage again"):
        set_peft_model_state_dict(model, tensors, adapter)
