"""Write adapters as the importable version of rankwise saves them, so that later versions prove that they load them.

    git worktree add /tmp/earlier COMMIT
    PYTHONPATH=/tmp/earlier/src python scripts/adapter_fixtures.py NAME

writes `tests/adapters/NAME/`: checkpoints of MiLoRA, SoRA and MiLoRA's start under SoRA's gates, each with its export,
and the outputs of the model with each. The base is a Llama of two layers whose weights follow from a formula. Kinds
that a version does not have are left out. Run once for each version that people may have adapters of; what is there is
never written again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import rankwise as rw

HOME = Path(__file__).resolve().parent.parent / "tests" / "adapters"
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(1, 13).reshape(2, 6)


def base() -> LlamaForCausalLM:
    """The model, in evaluation mode."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):
            steps = torch.arange(weight.numel(), dtype=torch.float64).reshape(weight.shape)
            wave = torch.sin(steps * (0.7 + 0.13 * number)) + torch.cos(steps**2 * 0.011 + number)
            weight.copy_(0.15 * wave if weight.ndim > 1 else 1 + 0.05 * wave)
    return model.eval()


def milora() -> peft.PeftConfig:
    """Of rank 2, as in the other kinds."""
    return rw.MiloraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM")


def sora() -> peft.PeftConfig:
    """With gates."""
    return rw.SoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM")


def milora_sora() -> peft.PeftConfig:
    """With gates over the smallest singular directions."""
    return rw.SoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM", part="minor")


KINDS: dict[str, Callable[[], peft.PeftConfig]] = {"milora": milora, "sora": sora, "milora_sora": milora_sora}


def trained(config: peft.PeftConfig) -> peft.PeftModel:
    """The adapter after four steps, some of its gates closed."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base(), config)
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(4):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for number, (name, weight) in enumerate(model.named_parameters()):
        if "lora_gate" in name and number % 2:
            weight.data[0] = 0
    return model.eval()


def main() -> None:
    """Write all kinds."""
    folder = HOME / sys.argv[1]
    if folder.exists():
        raise SystemExit(f"{folder} is there: a version's adapters are written once")
    print(rw.__file__)
    expected = {}
    for name, make in KINDS.items():
        try:
            config = make()
        except TypeError as error:
            print(f"{name} is left out: {error}")
            continue
        model = trained(config)
        with torch.no_grad():
            expected[name] = model(input_ids=TOKENS).logits
        model.save_pretrained(folder / name)
        (folder / name / "README.md").unlink(missing_ok=True)
        rw.export(model, folder / f"{name}-export")
    save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
