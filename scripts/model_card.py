"""The card of the small model that ships with rankwise, from its measurements.

python scripts/model_card.py src/rankwise/models/reviews     # writes README.md there from measurements.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def model_card(card: dict[str, Any]) -> str:
    """The card in words: data, training, measurements, samples, limits."""
    settings = SimpleNamespace(**card["settings"])
    names = {"held_out_reviews": "held-out film reviews", "wikitext2_test": "WikiText-2 test"}
    lines = [
        f"| {title} | {card[name]['nats_per_token']:.3f} | {card[name]['bits_per_byte']:.3f} "
        f"| {card[name]['unigram_nats_per_token']:.3f} | {card[name]['tokens']:,} |"
        for name, title in names.items()
    ]
    quotes = "\n\n".join("> " + text.replace("\n", "\n> ") for text in card["samples"])
    return f"""# A small language model of film reviews

Shipped with rankwise so that everything runs without a network. Made by `scripts/pretrain_tiny.py`; it is a base for
demonstrations and tests, not a model to build a product on.

- **Architecture:** Llama, {card["parameters"]:,} parameters ({settings.layers} layers, hidden size {settings.hidden},
  {settings.heads} heads, {settings.kv_heads} key-value heads, feed-forward {settings.feed_forward}), tied embeddings,
  context {settings.context:,}. Weights in bfloat16.
- **Tokenizer:** byte-level BPE, {settings.vocabulary:,} tokens, digits apart; `<|endoftext|>` begins and ends a text.
- **Data:** the labelled training reviews and the unlabelled reviews of the Large Movie Review Dataset
  (Maas et al. 2011), {card["stream_tokens"]:,} tokens. Reviews of its test split were not trained on.
- **Training:** {settings.steps:,} steps of {settings.tokens_per_step:,} tokens, {card["training_tokens"]:,} tokens in
  all ({card["passes"]:.2f} passes); rows of {settings.short_context} tokens, then of {settings.context:,} for the last
  {settings.long_share:.0%} of the steps; Muon and AdamW; seed {settings.seed}; bfloat16 arithmetic.
- **Limits:** it knows the language of film reviews of before 2011 and little else; it repeats what reviewers wrote,
  opinions and errors included.

Loss of the shipped weights, computed in float32 in windows of {settings.context:,} tokens, beside add-one smoothed
token frequencies of the training text:

| text | nats per token | bits per byte | unigram, nats per token | tokens |
| --- | ---: | ---: | ---: | ---: |
{chr(10).join(lines)}

Samples (temperature 0.8, the 50 likeliest tokens, seed 0, not chosen):

{quotes}
"""


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    measurements = json.loads((folder / "measurements.json").read_text(encoding="utf-8"))
    (folder / "README.md").write_text(model_card(measurements), encoding="utf-8")
