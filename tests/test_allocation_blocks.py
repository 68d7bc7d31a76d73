"""Passes that begin at a block: the same numbers, and less work, where a model lets them."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import tiny
import tiny_methods
from rankwise.ranks import importance
from rankwise.ranks.allocating import allocation
from rankwise.ranks.allocating.blocks import Blocks


class Whole(Blocks):
    """Every pass is a whole one."""

    def begin_at(self, place: int) -> None:
        pass


def scored(
    model: nn.Module, loss: Any, first: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Any], list[int]]:
    """Scores, and how often the first block computed: with whole passes, and as they are."""
    found, counts = [], []
    own = type(first).forward
    computed: list[nn.Module] = []

    def forward(self: nn.Module, *args: Any, **named: Any) -> Any:
        computed.extend([self] if self is first else [])
        return own(self, *args, **named)

    monkeypatch.setattr(type(first), "forward", forward)
    for kind in (Whole, Blocks):
        monkeypatch.setattr(allocation, "Blocks", kind)
        computed.clear()
        found.append(importance(model, loss))
        counts.append(len(computed))
    return found, counts


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def loss_of(model: nn.Module) -> Tensor:
    labels = tiny.LABELS if "query" in str(model) else tiny.IDS
    return model(input_ids=tiny.IDS, labels=labels).loss


@pytest.mark.parametrize("family", [*tiny.TARGETS, "encoder-decoder"])
def test_scores_are_those_of_whole_passes_to_the_bit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if family == "encoder-decoder":
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_2_SEQ_LM")
        model = tiny.train(peft.get_peft_model(tiny_methods.base(family), config))
    else:
        model = tiny.adapted(family, r=2)
    first = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0]
    (whole, found), (before, after) = scored(model, loss_of, first, monkeypatch)
    assert_equal(whole, found)
    directions = sum(map(len, found.values()))
    assert before >= 2 * directions and after < 0.75 * before
    assert not any("forward" in vars(module) for module in model.modules())


def test_adapters_that_are_zero_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each direction alone those of its own layer only; the scores are the same to the bit."""
    model = tiny.adapted("llama", r=2)
    layers, passes = list(tiny.layers(model).values()), 0
    computed = [0] * len(layers)

    def count(number: int, *_: Any) -> None:
        computed[number] += 1

    for number, layer in enumerate(layers):
        layer.lora_A["default"].register_forward_pre_hook(partial(count, number))

    def loss(scored: nn.Module) -> Tensor:
        nonlocal passes
        passes += 1
        return loss_of(scored)

    monkeypatch.setattr(allocation, "Blocks", Whole)
    found = importance(model, loss)
    alone = 2 * len(layers)
    assert computed == [passes - alone + 2] * len(layers)
    first, passes, computed[:] = passes, 0, [0] * len(layers)
    monkeypatch.setattr(allocation, "_silent", lambda layers: nullcontext())
    assert_equal(importance(model, loss), found)
    assert computed == [passes] * len(layers) and passes == first


class Net(nn.Module):
    """Three blocks; ``how`` says what is odd about them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for block in [*self.blocks, self.blocks[0]] if self.how == "a block twice" else self.blocks:
            x = block(x)
            if self.how == "changed in place":
                x.mul_(1.5)
            kept.append(x)
        return x + kept[0] if self.how == "the first block is looked at" else x


@pytest.mark.parametrize("how", ["a block twice", "changed in place", "the first block is looked at", "nothing"])
def test_a_model_that_does_not_let_them_is_scored_by_whole_passes(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = Net(how)
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["blocks.0.0", "blocks.1.0", "blocks.2.0"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    x = torch.randn(5, 6)
    own = net.blocks[1].forward
    net.blocks[1].forward = lambda *args: own(*args)  # as other libraries wrap it
    wrapped = net.blocks[1].forward
    (whole, found), _ = scored(model, lambda scored: (scored(x) ** 2).mean(), net.blocks[0], monkeypatch)
    assert_equal(whole, found)
    assert net.blocks[1].forward is wrapped and "forward" not in vars(net.blocks[2])
    blocks = Blocks(model.eval(), lambda: float((model(x) ** 2).mean()))
    assert blocks.place(net.blocks[2][0]) == (2 if how == "nothing" else 0)
