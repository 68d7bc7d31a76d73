"""What a recipe can say: every setting, its type, its default and its meaning."""

from rankwise.schema.adapters import (
    AdaloraSettings,
    Adapter,
    AllocatingLoraSettings,
    LoraSettings,
    MiloraSettings,
    SoraSettings,
)
from rankwise.schema.base import EMBEDDED, Section
from rankwise.schema.data import (
    ChoiceData,
    ClassificationData,
    GlueData,
    InstructionData,
    InteractionData,
    MathsData,
    PreferenceData,
    RecommendationSettings,
    SdpoData,
    TextData,
)
from rankwise.schema.recipe import EvaluationSettings, ExportSettings, ModelSettings, Recipe
from rankwise.schema.stages import AnyStage, RisingThresholds, SftStage, SoftmaxDpoStage

__all__ = [
    "EMBEDDED",
    "AdaloraSettings",
    "Adapter",
    "AllocatingLoraSettings",
    "AnyStage",
    "ChoiceData",
    "ClassificationData",
    "EvaluationSettings",
    "ExportSettings",
    "GlueData",
    "InstructionData",
    "InteractionData",
    "LoraSettings",
    "MathsData",
    "MiloraSettings",
    "ModelSettings",
    "PreferenceData",
    "Recipe",
    "RecommendationSettings",
    "RisingThresholds",
    "SdpoData",
    "Section",
    "SftStage",
    "SoftmaxDpoStage",
    "SoraSettings",
    "TextData",
]
