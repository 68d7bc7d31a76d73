"""A reference leaves no trace: the policy is as it was, and trains on as if there had been none."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
import tiny
from rankwise.errors import UserError
from rankwise.peft_bridge import adapted_layers
from rankwise.preferences.reference import Reference, StartReference, choose_reference
from rankwise.ranks.resizing import resize_adapter
from tiny_policies import POLICIES, assert_same, move, scores, state_of, step, two_adapters


@pytest.fixture(params=["start", "base", "adapter", "model"])
def any_reference(request: pytest.FixtureRequest) -> tuple[nn.Module, Reference]:
    """A policy in training mode that has moved, with gradients, and a reference of it."""
    policy = two_adapters()
    arguments: dict[str, dict[str, Any]] = {
        "start": {},
        "base": {"source": "base"},
        "adapter": {"adapter": "sft"},
        "model": {"ref_model": tiny.make("llama")},
    }
    reference = choose_reference(policy, **arguments[request.param])
    assert reference is not None
    reference.keep()
    policy.base_model.model.gradient_checkpointing_enable()
    policy.enable_input_require_grads()
    move(policy)
    tiny.loss(policy).backward()
    return policy, reference


@pytest.mark.parametrize("name", list(POLICIES))
def test_the_policy_trains_on_as_if_there_was_no_reference(name: str) -> None:
    """The same values to the bit, with a reference in use between every two steps, and with one between a loss and its
    gradients."""
    policy = POLICIES[name]()
    alone = copy.deepcopy(policy)
    reference = choose_reference(policy)
    assert reference is not None
    reference.keep()
    optimizers = [move(model, steps=1) for model in (policy, alone)]
    for number in range(3):
        torch.manual_seed(number)
        step(alone, optimizers[1])
        scores(reference)
        torch.manual_seed(number)
        loss = policy(input_ids=tiny.IDS, labels=tiny.IDS).loss
        scores(reference)
        loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
    expected, found = (dict(model.named_parameters()) for model in (alone, policy))
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    states = [
        [value for one in optimizer.state_dict()["state"].values() for value in one.values()]
        for optimizer in optimizers
    ]
    assert len(states[0]) == len(states[1]) > 0
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_all_is_as_before_when_the_reference_is_left(any_reference: tuple[nn.Module, Reference]) -> None:
    policy, reference = any_reference
    policy.base_model.model.model.layers[0].eval()  # of its own mode
    trained = next(value for name, value in policy.named_parameters() if "q_proj.lora_A.default" in name)
    trained.requires_grad = False  # frozen by the user, which PEFT's own switching would forget
    before = state_of(policy)
    with reference.active() as model:
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        assert not model(input_ids=tiny.IDS).logits.requires_grad
    assert torch.is_grad_enabled()
    assert_same(before, state_of(policy))


def test_all_is_as_before_after_an_error(any_reference: tuple[nn.Module, Reference]) -> None:
    policy, reference = any_reference
    before = state_of(policy)
    with pytest.raises(KeyboardInterrupt), reference.active() as model:
        model(input_ids=tiny.IDS)
        raise KeyboardInterrupt
    assert torch.is_grad_enabled()
    assert_same(before, state_of(policy))


def test_choosing_a_reference_changes_nothing() -> None:
    policy = two_adapters().train()
    tiny.loss(policy).backward()
    before = state_of(policy)
    for arguments in ({}, {"source": "base"}, {"adapter": "sft"}, {"ref_model": tiny.make("llama")}):
        choose_reference(policy, **arguments)
    assert_same(before, state_of(policy))


def test_gradients_are_checkpointed_as_before(any_reference: tuple[nn.Module, Reference]) -> None:
    policy, reference = any_reference
    layer = policy.base_model.model.model.layers[0]
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    layer.mlp.register_forward_pre_hook(count)
    scores(reference)
    calls = 0
    tiny.loss(policy).backward()
    assert calls == 2  # once forward, once more for the gradients


def test_ranks_that_change_while_training() -> None:
    """Directions are cut and added, and one layer loses all of its own; the start has them as they were."""
    policy = tiny.adapted("llama", rw.SoraConfig, lora_alpha=8, part=None)
    independent = copy.deepcopy(policy).eval()
    reference = StartReference(policy)
    reference.keep()
    names = [name for name, _ in adapted_layers(policy, "default")]
    kept = {
        names[0]: torch.tensor([True, False, False, True]),
        names[1]: torch.zeros(4, dtype=torch.bool),
    }
    optimizer = move(policy)
    assert resize_adapter(policy, kept, {names[2]: 2}, optimizer) == (names[1],)
    alone = copy.deepcopy(policy)
    before = state_of(policy)
    assert torch.equal(scores(reference), tiny.logits(independent))
    assert_same(before, state_of(policy))
    assert type(policy.get_base_model().get_submodule(names[1])) is nn.Linear
    torch.manual_seed(1)
    step(policy, optimizer)
    assert not torch.equal(tiny.logits(policy.eval()), tiny.logits(alone.eval()))
    assert torch.equal(scores(reference), tiny.logits(independent))


def test_gradients_of_cut_ranks_are_those_without_a_reference() -> None:
    policy = tiny.adapted("llama", rw.SoraConfig, lora_alpha=8, part="minor")
    reference = StartReference(policy)
    reference.keep()
    name = next(name for name, _ in adapted_layers(policy, "default"))
    resize_adapter(policy, {name: torch.tensor([True, False, False, True])})
    tiny.loss(policy).backward()
    expected = {name: value.grad.clone() for name, value in policy.named_parameters() if value.grad is not None}
    policy.zero_grad()
    loss = tiny.loss(policy)
    scores(reference)
    loss.backward()
    found = {name: value.grad for name, value in policy.named_parameters() if value.grad is not None}
    assert expected.keys() == found.keys() and len(expected) == 18
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_a_start_that_cannot_be_put_back_is_refused() -> None:
    policy = tiny.adapted("llama")
    reference = StartReference(policy)
    reference.keep()
    layer = next(layer for _, layer in adapted_layers(policy, "default"))
    lost = layer.lora_A.pop("default")
    before = state_of(policy)
    message = r"q_proj.lora_A.default.weight is gone since .*, so that reference='start' cannot be put back.*ref_model"
    with pytest.raises(UserError, match=message), reference.active():
        pass
    assert_same(before, state_of(policy))
    layer.lora_A["default"] = lost
    lost.weight.data = lost.weight.data.flatten()  # as a wrapper that lays weights end to end has it
    with pytest.raises(UserError, match=r"lora_A.default.weight has another form since the start"), reference.active():
        pass


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of processes that has one."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    torch.distributed.init_process_group("gloo")
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_weights_that_are_spread_over_processes_are_refused() -> None:
    """Kept before the model is sharded, or after."""
    policy = tiny.make("llama")
    reference = StartReference(policy)
    reference.keep()
    torch.distributed.fsdp.fully_shard(policy)
    message = r"embed_tokens.weight is a DTensor, spread over processes or packed, of which reference='start'"
    with pytest.raises(UserError, match=message), reference.active():
        pass
    with pytest.raises(UserError, match=message):
        reference.keep()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("arguments", [{}, {"source": "base"}, {"adapter": "sft"}])
def test_gradients_are_still_gathered_by_distributed_data_parallel(arguments: dict[str, Any]) -> None:
    """It hangs its work on weights that take gradients; a reference turns those off and on again."""
    policy = two_adapters()
    alone = copy.deepcopy(policy).train()
    reference = choose_reference(policy, **arguments)
    assert reference is not None
    reference.keep()
    wrapped = nn.parallel.DistributedDataParallel(policy.train())
    gathered = 0

    def count(_, bucket):  # torch reads annotations, and cannot read text
        nonlocal gathered
        gathered += bucket.buffer().numel()
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    wrapped.register_comm_hook(None, count)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.05) for model in (alone, policy)]
    for number in range(2):
        torch.manual_seed(number)
        step(alone, optimizers[0])
        scores(reference)
        torch.manual_seed(number)
        loss = wrapped(input_ids=tiny.IDS, labels=tiny.IDS).loss
        scores(reference)
        loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    assert gathered == 2 * sum(value.numel() for value in policy.parameters() if value.requires_grad)
    for one, other in zip(alone.parameters(), policy.parameters(), strict=True):
        assert torch.equal(one, other)
