"""Adapters of convolutions: written in PEFT's shapes, merged, and measured against the layers themselves."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import rankwise as rw
from rankwise import MiloraConfig, SoraConfig
from rankwise.errors import UserError

PATCHES = "vit.embeddings.patch_embeddings.projection"
PICTURES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def vit() -> ViTForImageClassification:
    """A transformer of two layers whose patches are read by a convolution of 3 channels and a kernel of 4 x 4."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=3,
        initializer_range=0.2,
    )
    return ViTForImageClassification(config).eval()


def trained(config: type[LoraConfig], **settings) -> peft.PeftModel:
    torch.manual_seed(1)
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": ["projection", "fc1"], "rank_pattern": {"projection": 3}}
    model = peft.get_peft_model(vit(), config(**chosen | settings))
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=2e-2)
    for _ in range(3):
        model(pixel_values=PICTURES, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def update(model: peft.PeftModel) -> torch.Tensor:
    """The convolution's update in float64 as (out, in x kernel): its answers to pictures of one bright point."""
    layer = copy.deepcopy(model).double().get_base_model().get_submodule(PATCHES)
    points = torch.eye(48, dtype=torch.float64).reshape(48, 3, 4, 4)
    return (layer(points) - layer.base_layer(points)).flatten(1).T


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(pixel_values=PICTURES).logits


@pytest.mark.parametrize("layout", ["uniform", "compact"])
@pytest.mark.parametrize("config", [LoraConfig, MiloraConfig, SoraConfig])
def test_plain_lora_of_a_convolution(tmp_path, config, layout):
    model = trained(config)
    report = rw.export(model, tmp_path, layout=layout)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{PATCHES}.lora_{half}.weight"] for half in "AB")
    rank = 3 * (2 if config is MiloraConfig else 1)
    assert report.ranks[PATCHES] == rank
    written = rank if layout == "compact" else max(report.ranks.values())
    assert a.shape == (written, 3, 4, 4) and b.shape == (16, written, 1, 1)
    exact = update(model)
    error = float((b.double().flatten(1) @ a.double().flatten(1) - exact).norm() / exact.norm())
    assert error < 1e-6 and report.module_errors[PATCHES] == pytest.approx(error, abs=2e-7)
    loaded = peft.PeftModel.from_pretrained(vit(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [LoraConfig, MiloraConfig, SoraConfig])
def test_a_merged_convolution(tmp_path, config):
    model = trained(config)
    report = rw.export(model, tmp_path, layout="merged")
    loaded = ViTForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)
    base, exact = vit().get_submodule(PATCHES).weight.double(), update(model)
    merged = loaded.get_submodule(PATCHES).weight.double()
    error = float(((merged - base).flatten(1) - exact).norm() / exact.norm())
    assert report.module_errors[PATCHES] == pytest.approx(error, rel=1e-2)


class Convolved(nn.Module):
    def __init__(self, **settings) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, **settings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


def test_a_convolution_of_groups_is_refused(tmp_path):
    model = peft.get_peft_model(Convolved(groups=2), LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(UserError, match="first: a convolution of several groups is no single matrix"):
        rw.export(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_merging_a_dilated_convolution_is_refused(tmp_path):
    base = vit()
    base.get_submodule(PATCHES).dilation = (2, 2)
    model = peft.get_peft_model(base, LoraConfig(r=2, target_modules=["projection"]))
    with pytest.raises(UserError, match=f"{PATCHES}: PEFT's adapter of a dilated convolution is not dilated"):
        rw.export(model, tmp_path / "merged", layout="merged")
