"""The stages of a run as one recommender: their adapters lie beside one another on a single base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from rankwise.errors import UserError, nearest
from rankwise.evaluation import open_run
from rankwise.methods import base_of, load_stage, stage_config, with_adapter
from rankwise.models import context_limit, load_language_model, load_tokenizer
from rankwise.peft_bridge import active_adapter
from rankwise.recommend.recommender import Recommender
from rankwise.recommend.store import STORE, read_store
from rankwise.run import BASE
from rankwise.schema import BitfitSettings, FullSettings, Recipe

TASK = "CAUSAL_LM"
SFT = "sft"


class Stages:
    """A recommender whose model can be put into the state that each of several stages left.

    Args:
        recommender: on a model with the adapters of all stages.
        kinds: what each stage is: ``base``, ``sft`` or ``softmax_dpo``, in the order of training.
        adapters: PEFT's name of each stage's adapter; a stage without one is the model without adapters.

    Attributes:
        recommender: as given; its answers are a stage's inside of :meth:`use`.
        kinds: as given.
    """

    def __init__(self, recommender: Recommender, kinds: Mapping[str, str], adapters: Mapping[str, str]) -> None:
        self.recommender, self.kinds = recommender, dict(kinds)
        self._adapters = dict(adapters)

    @property
    def after(self) -> str:
        """The last stage."""
        return list(self.kinds)[-1]

    @property
    def before(self) -> str:
        """What the last stage is best compared with: the last supervised one before it, else the one before it."""
        earlier = list(self.kinds)[:-1]
        supervised = [name for name in earlier if self.kinds[name] == SFT]
        return (supervised or earlier or [self.after])[-1]

    @contextmanager
    def use(self, stage: str) -> Iterator[Recommender]:
        """The recommender as a stage left it; one thread at a time.

        Raises:
            UserError: there is no such stage.
        """
        self.check(stage)
        model = self.recommender.model
        if not isinstance(model, PeftModel):
            yield self.recommender
            return
        adapter = self._adapters.get(stage)
        if adapter is None:
            with base_of(model):
                yield self.recommender
            return
        if model.active_adapter != adapter:
            model.set_adapter(adapter, inference_mode=True)
        yield self.recommender

    def check(self, stage: str) -> None:
        """See that there is such a stage.

        Raises:
            UserError: there is none.
        """
        if stage not in self.kinds:
            raise UserError(f"stage {stage!r} is not served: {nearest(stage, self.kinds)}")

    def give_up(self) -> None:
        """End what another thread has the model do at its next layer, by an error there; for good."""
        for module in self.recommender.model.modules():
            module.register_forward_pre_hook(_give_up)


def _give_up(module: nn.Module, arguments: object) -> None:
    raise RuntimeError("the model has been given up")


def load_stages(run: str | Path, names: Sequence[str] | None = None) -> Stages:
    """The stages of a finished run, on one base model: each costs its adapter's parameters, not another model.

    Args:
        run: the run's folder.
        names: of stages, or ``base model`` for the model before any training; all that are finished where None.

    Raises:
        UserError: it is no finished run on interactions or published lists, or has no such stage.
    """
    run = Path(run)
    recipe = open_run(run)
    store = read_store(run / STORE)
    chosen = _chosen(run, recipe, names)
    if isinstance(recipe.adapter, FullSettings | BitfitSettings) and len(set(chosen) - {BASE}) > 1:
        stages = ", ".join(name for name in chosen if name != BASE)
        raise UserError(
            f"adapter.kind {recipe.adapter.kind} changes the model's own weights, so that only one stage of {run} can "
            f"be served at a time: name one of {stages} with --stage"
        )
    tokenizer = load_tokenizer(recipe.model.path)
    model: PreTrainedModel | PeftModel = load_language_model(recipe.model)
    adapters: dict[str, str] = {}
    for stage in chosen:
        if stage != BASE:
            model = _with_stage(model, recipe, run / "stages" / stage)
            adapters[stage] = active_adapter(model)
    context = context_limit(recipe.model, tokenizer, recipe.virtual_tokens)
    recommender = Recommender(model, tokenizer, store, context)
    return Stages(recommender, chosen, adapters)


def _chosen(run: Path, recipe: Recipe, names: Sequence[str] | None) -> dict[str, str]:
    """Kinds of the stages to serve, in the order of training."""
    finished = {stage.name: stage.kind for stage in recipe.stages if (run / "stages" / stage.name).is_dir()}
    known: dict[str, str] = {BASE: "base"} | finished
    if not finished:
        raise UserError(f"{run} has no finished stage: give the folder of a finished `rankwise train`")
    for name in names or ():
        if name not in known:
            raise UserError(f"stage {name!r} is not in {run}: {nearest(name, known)}")
    return {name: kind for name, kind in known.items() if names is None or name in names}


def _with_stage(model: PreTrainedModel | PeftModel, recipe: Recipe, folder: Path) -> PeftModel:
    """The model with a saved stage as one more adapter, which is the active one."""
    if isinstance(model, PeftModel):
        adapter = f"stage-{len(model.peft_config)}"  # PEFT takes no dots, and the stage's own name may have some
        model.add_adapter(adapter, stage_config(recipe, TASK, folder))
        model.set_adapter(adapter)
    else:
        model = with_adapter(model, recipe, TASK, folder)
    load_stage(model, folder)
    model.peft_config[active_adapter(model)].inference_mode = True
    model.requires_grad_(False)
    return model
