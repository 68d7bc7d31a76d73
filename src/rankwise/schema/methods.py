"""Every method by name: what it is, who described it, and the adapter settings that stand for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rankwise.errors import nearest


class Method(NamedTuple):
    """One method.

    Attributes:
        title: its usual name.
        paper: its number on arXiv; empty where there is none.
        settings: the adapter section of a recipe that it stands for.
        merges: whether the base's weights can take it up, so that it costs nothing when it is used.
    """

    title: str
    paper: str
    settings: Mapping[str, Any]
    merges: bool = True


METHODS: dict[str, Method] = {
    "full": Method("full fine-tuning", "", {"kind": "full"}),
    "bitfit": Method("BitFit", "2106.10199", {"kind": "bitfit"}),
    "houlsby": Method("bottleneck adapters (Houlsby)", "1902.00751", {"kind": "bottleneck"}, merges=False),
    "pfeiffer": Method(
        "bottleneck adapters (Pfeiffer)", "2005.00247", {"kind": "bottleneck", "placement": "pfeiffer"}, merges=False
    ),
    "prompt": Method("prompt tuning", "2104.08691", {"kind": "prompt"}, merges=False),
    "prefix": Method("prefix tuning", "2101.00190", {"kind": "prefix"}, merges=False),
    "lora": Method("LoRA", "2106.09685", {"kind": "lora"}),
    "lora_plus": Method("LoRA+", "2402.12354", {"kind": "lora", "lora_plus_ratio": 16.0}),
    "rslora": Method("rsLoRA", "2312.03732", {"kind": "lora", "use_rslora": True}),
    "dora": Method("DoRA", "2402.09353", {"kind": "lora", "use_dora": True}),
    "vera": Method("VeRA", "2310.11454", {"kind": "vera"}),
    "pissa": Method("PiSSA", "2404.02948", {"kind": "milora", "part": "principal"}),
    "olora": Method("OLoRA", "2406.01775", {"kind": "milora", "part": "qr"}),
    "adalora": Method("AdaLoRA", "2303.10512", {"kind": "adalora"}),
    "allocating_lora": Method("ALoRA (allocating LoRA)", "2403.16187", {"kind": "allocating_lora"}),
    "sora": Method("SoRA", "2311.11696", {"kind": "sora"}),
    "milora": Method("MiLoRA", "2406.09044", {"kind": "milora"}),
    "milora_sora": Method("MiLoRA with SoRA", "2406.09044, 2311.11696", {"kind": "sora", "part": "minor"}),
    "milora_dora": Method("MiLoRA with DoRA", "2406.09044, 2402.09353", {"kind": "milora", "use_dora": True}),
}
DEFAULT = "milora"


def written_out(adapter: Any) -> Any:
    """An adapter section with the method that its ``kind`` names written out; a text is a method's name alone.

    Raises:
        ValueError: the name is no method's and no kind, or a setting contradicts it.
    """
    if isinstance(adapter, str):
        adapter = {"kind": adapter}
    if not isinstance(adapter, dict):
        return adapter
    name = adapter.get("kind", DEFAULT)
    if not isinstance(name, str):
        raise ValueError(f"adapter.kind {name!r} is no text: give a method's name")
    if name not in METHODS:
        kinds = {str(method.settings["kind"]) for method in METHODS.values()}
        if name not in kinds:
            raise ValueError(f"adapter.kind {name!r} is unknown: {nearest(str(name), sorted(kinds | METHODS.keys()))}")
        return adapter
    settings = METHODS[name].settings
    for key, value in settings.items():  # a number is where the method usually begins, all else is what it is
        if key != "kind" and not isinstance(value, float) and adapter.get(key, value) != value:
            raise ValueError(f"adapter.{key} {adapter[key]!r} is not {METHODS[name].title}, whose {key} is {value!r}")
    return {**settings, **adapter, "kind": settings["kind"]}
