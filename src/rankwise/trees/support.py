"""Which models take a tree: those whose tokens meet only through attention under a mask, at positions that we give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from rankwise.likelihood import forward_arguments, unwrapped
from rankwise.trees.masks import DENSE, FLEX, attention_of
from rankwise.trees.probing import trees_are_exact

# Families (`model_type`) whose trees are tested to be exact; any other model is tried out on a small tree.
TESTED = {
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    *("gpt2", "gpt_neox", "opt", "phi", "phi3"),
}
# Layers in which tokens meet through attention under a mask alone, with the setting that limits how far it reaches.
ATTENTION = {"full_attention": "", "sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


def why_no_trees(model: nn.Module, longest: int) -> str | None:
    """The reason why answers of this model are to be scored as separate sequences; None where trees are exact.

    What is known to be in the way is looked up in the model and its config. A model of a family that is not among the
    tested ones then scores a small tree both ways (:func:`rankwise.trees.probing.trees_are_exact`).

    Args:
        model: a causal language model, adapted or not; not yet wrapped for mixed precision, whose rounding would count.
        longest: tokens of the longest sequence, prompt and answer.
    """
    reason = next(_obstacles(model, longest), None)
    if reason or unwrapped(model).config.model_type in TESTED:
        return reason
    try:
        exact = trees_are_exact(model)
    except Exception as error:  # of any kind: it comes from the model's own code
        return f"its forward fails with a tree ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return None if exact else "it gives a tree's answers other log-probabilities than separate sequences"


def _obstacles(model: nn.Module, longest: int) -> Iterator[str]:
    inner: Any = unwrapped(model)
    config = inner.config.get_text_config()
    if inner.config.is_encoder_decoder:
        yield "it is an encoder-decoder model"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None) is True:
        yield "it is not causal: its tokens see later ones"
    if inner.get_output_embeddings() is None:
        yield "it has no output head that can be told where to run"
    yield from _layers(inner, config, longest)
    if (attention := attention_of(model)) not in (*DENSE, FLEX):
        yield f"its attention {attention!r} takes no mask: load it with attn_implementation='sdpa'"
    adapter = getattr(getattr(model, "module", model), "active_peft_config", None)
    if adapter is not None and (adapter.is_prompt_learning or adapter.is_adaption_prompt):
        yield f"its adapter ({adapter.peft_type.value}) puts virtual tokens before the prompt"
    yield from _positions(model, config, longest)


def _layers(inner: Any, config: Any, longest: int) -> Iterator[str]:
    """Layers that carry a state from token to token, into the next answer, or that do not reach all of a sequence."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    for kind in sorted(set(kinds or ()) - ATTENTION.keys()):
        yield f"its layers of type {kind!r} are not attention under a mask alone"
    if not kinds and inner._is_stateful:
        yield "it carries a state from token to token"
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    for name in sorted({ATTENTION[kind] for kind in kinds or ("sliding_attention",)}):
        reach = min(filter(None, (getattr(layer, name, None) for layer in layers)), default=longest)
        if reach < longest:
            yield f"its {name} of {reach} tokens is shorter than a sequence of {longest}"


def _positions(model: nn.Module, config: Any, longest: int) -> Iterator[str]:
    """Positions that are not ours to give, or not up to this length, or that depend on the batch's longest sequence."""
    if "position_ids" not in forward_arguments(model) or getattr(config, "alibi", False):
        yield "its positions are places in the row, whatever position_ids say"
    for name, module in unwrapped(model).get_decoder().named_modules():
        if isinstance(module, nn.Embedding) and ("position" in name or "wpe" in name):
            size = module.num_embeddings - getattr(module, "offset", 0)
            if size < longest:
                yield f"its table of {size} positions is shorter than a sequence of {longest}"
    rotary = getattr(config, "rope_parameters", None) or {}
    for rope in (rotary, *rotary.values()):
        if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):
            size = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            if size < longest:
                kind = rope["rope_type"]
                yield f"its rotary positions ({kind}) change beyond {size} tokens, and a sequence has {longest}"
