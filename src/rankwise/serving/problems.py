"""What is wrong with a request, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.errors import nearest
from rankwise.serving.schema import Asked

NAMED = 3  # of several mistakes
LONGEST = 60  # characters of a name that is said again


def explain(errors: Sequence[Mapping[str, Any]]) -> str:
    """One sentence for pydantic's list of errors; it has the names of fields, and no values."""
    sentences = [_sentence(error) for error in errors[:NAMED]]
    if len(errors) > NAMED:
        sentences.append(f"and {len(errors) - NAMED} more")
    return "; ".join(sentences)


def _sentence(error: Mapping[str, Any]) -> str:
    place, reason = error["loc"][1:], str(error["msg"])
    if error["type"] == "json_invalid":
        return f"the body is no JSON: {error['ctx']['error']}, at character {place[0]}"
    if not place and error["type"] in ("missing", "model_attributes_type"):
        return "the body must be a JSON object, sent as application/json"
    reason = reason.removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"field {str(place[-1])[:LONGEST]!r} is unknown: {nearest(str(place[-1])[:LONGEST], Asked.model_fields)}"
    return f"{'.'.join(map(str, place))}: {reason}" if place else reason
