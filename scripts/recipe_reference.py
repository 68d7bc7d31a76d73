"""Write docs/recipes.md: every key of a recipe, from the schema itself.

Without an option the page is written; with ``--check`` the script exits with 1 where the page is out of date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from pydantic.fields import FieldInfo

from rankwise import schema

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
SECTIONS: dict[str, tuple[type[schema.Section], ...]] = {
    "Recipe": (schema.Recipe,),
    "model": (schema.ModelSettings,),
    "adapter": (
        schema.LoraSettings,
        schema.MiloraSettings,
        schema.SoraSettings,
        schema.AllocatingLoraSettings,
        schema.AdaloraSettings,
        schema.VeraSettings,
        schema.BottleneckSettings,
        schema.PromptSettings,
        schema.PrefixSettings,
        schema.BitfitSettings,
        schema.FullSettings,
    ),
    "data": (
        schema.InteractionData,
        schema.SdpoData,
        schema.InstructionData,
        schema.MathsData,
        schema.ChoiceData,
        schema.PreferenceData,
        schema.ClassificationData,
        schema.GlueData,
        schema.SequenceData,
        schema.TextData,
    ),
    "stages": (schema.SftStage, schema.SoftmaxDpoStage),
    "stages.thresholds": (schema.RisingThresholds,),
    "evaluation": (schema.EvaluationSettings,),
    "export": (schema.ExportSettings,),
    "A comparison": (schema.Comparison,),
    "methods": (schema.MethodEntry,),
    "search": (schema.Search,),
}
HEAD = """# Recipes

A recipe is a YAML file with everything that a run depends on. Unknown keys are errors, and everything is checked before
anything slow happens. `rankwise train recipe.yaml stages.0.epochs=2 seed=1` overrides single values; positions in lists
count from 0. Paths are taken from the folder you are in; `~` and `$VARIABLES` in data paths are filled in.
[examples/](../examples) holds one recipe for each kind of data. `adapter: dora` alone, or `kind: dora` among an
adapter's settings, stands for what the method's name means; `rankwise methods` lists the names.

This page is written by `python scripts/recipe_reference.py` from the schema.
"""


def default_of(field: FieldInfo) -> str:
    """The default as YAML would have it; a dash where a value is needed."""
    if field.is_required():
        return "needed"
    value: Any = field.default
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        value = value.replace("\n", "\\n")
    return "" if value is None else f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def table(section: type[schema.Section]) -> str:
    """One section's keys."""
    if not any(field.description for field in section.model_fields.values()):
        return "It has no settings."
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in section.model_fields.items():
        if field.description:
            choices = [str(option) for option in get_args(field.annotation) if isinstance(option, str)]
            accepted = f" One of: {', '.join(choices)}." if choices else ""
            lines.append(f"| `{name}` | {default_of(field)} | {field.description}{accepted} |")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, sections in SECTIONS.items():
        parts.append(f"## {title}\n" if title[0].isupper() else f"## `{title}`\n")
        for section in sections:
            kind = section.model_fields.get("kind")
            if kind is not None and get_args(kind.annotation):
                parts.append(f"### kind: {get_args(kind.annotation)[0]}\n")
            parts.append(f"{(section.__doc__ or '').strip()}\n\n{table(section)}\n")
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
