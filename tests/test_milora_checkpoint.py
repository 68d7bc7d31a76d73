from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rankwise as rw
import tiny
from rankwise.directions import load_checkpoint
from rankwise.directions.checkpoint import Pair, plain_config, split_pair, stack_pair, start_distance, start_ratio
from rankwise.errors import UserError

FAMILIES = list(tiny.TARGETS)
WEIGHTS = "adapter_model.safetensors"


def optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


class Kinds(nn.Module):
    """One module of each kind: tokens are embedded, seen as pictures of 4 x 4, convolved, and projected."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(24, 16)
        self.picture = nn.Conv2d(1, 6, 3, padding=1)
        self.head = nn.Linear(96, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.picture(self.words(x)[:, None].unflatten(-1, (4, 4))).flatten(1))


def kinds() -> Kinds:
    torch.manual_seed(0)
    return Kinds().eval()


TOKENS = torch.tensor([3, 17, 8, 0])


def trained_kinds(**settings) -> peft.PeftModel:
    config = rw.MiloraConfig(r=2, target_modules=["words", "picture", "head"], **settings)
    model = peft.get_peft_model(kinds(), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(TOKENS).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


SETTINGS = {
    "plain": {},
    "alpha": {"lora_alpha": 6},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}},
    "alphas": {"alpha_pattern": {"v_proj": 5, "layers.0.self_attn.q_proj": 3.5}},
    "both": {"rank_pattern": {"q_proj": 2, "v_proj": 5}, "alpha_pattern": {"v_proj": 5, "down_proj": 9}},
    "both with rslora": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, "v_proj": 5},
        "alpha_pattern": {"v_proj": 5, "down_proj": 9},
    },
}


@pytest.mark.parametrize("case", SETTINGS)
def test_every_layer_keeps_its_scaling_at_twice_the_rank(case):
    model = tiny.milora(tiny.make("llama"), **SETTINGS[case])
    plain = peft.get_peft_model(tiny.make("llama"), plain_config(model.peft_config["default"]))
    ours, theirs = tiny.layers(model), tiny.layers(plain)
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        assert theirs[name].r["default"] == 2 * layer.r["default"]
        assert theirs[name].scaling["default"] == pytest.approx(layer.scaling["default"], rel=1e-12)


def test_a_stacked_pair_comes_apart_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(*size, generator=generator) for size in ((3, 2, 5, 5), (7, 3, 1, 1))]
    started = [torch.randn(*size, generator=generator) for size in ((3, 2, 5, 5), (7, 3, 1, 1))]
    a, b = stack_pair(Pair(*made, *started))
    assert (a.shape, b.shape) == ((6, 2, 5, 5), (7, 6, 1, 1))
    product = b.flatten(1) @ a.flatten(1)
    expected = made[1].flatten(1) @ made[0].flatten(1) - started[1].flatten(1) @ started[0].flatten(1)
    torch.testing.assert_close(product, expected)
    for found, given in zip(split_pair(a, b), (*made, *started), strict=True):
        assert torch.equal(found, given) and found.is_contiguous()


def test_distance_of_two_starts_agrees_with_dense_products():
    generator = torch.Generator().manual_seed(0)
    a, a0 = (torch.randn(3, 20, generator=generator) for _ in range(2))
    b, b0 = (torch.randn(8, 3, generator=generator) for _ in range(2))
    near = Pair(a0 + 1e-4 * a, b0, a0, b0)
    for pair in (Pair(a, b, a0, b0), near):
        dense = (pair.B @ pair.A - pair.B0 @ pair.A0).double().norm() / (b0 @ a0).double().norm()
        assert start_distance(pair) == pytest.approx(float(dense), rel=1e-3)
    # The same product from turned factors is the same start.
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q
    assert start_distance(Pair(turn.T @ a0, b0 @ turn, a0, b0)) < 1e-6
    ratio = ((b @ a) * (b0 @ a0)).double().sum() / (b0 @ a0).double().square().sum()
    assert start_ratio(Pair(a, b, a0, b0)) == pytest.approx(float(ratio), rel=1e-5)
    assert start_ratio(Pair(turn.T @ a0, 3 * b0 @ turn, a0, b0)) == pytest.approx(3, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_plain_lora_of_twice_the_rank(tmp_path, family):
    model = tiny.train(tiny.milora(tiny.make(family), family, lora_alpha=6, use_rslora=True))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 8)
    assert config.keys() == peft.LoraConfig().to_dict().keys()
    tensors = load_file(tmp_path / WEIGHTS)
    assert {name.rpartition(".lora_")[2] for name in tensors} == {"A.weight", "B.weight"}
    loaded = peft.PeftModel.from_pretrained(tiny.make(family), tmp_path)
    assert type(loaded.peft_config["default"]) is peft.LoraConfig
    torch.testing.assert_close(tiny.logits(loaded), tiny.logits(model), atol=1e-5, rtol=1e-5)
    with loaded.disable_adapter():
        assert torch.equal(tiny.logits(loaded), tiny.logits(tiny.make(family)))


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "rank_pattern": {"picture": 3}}], ids=["plain", "mixed"])
def test_embeddings_and_convolutions_too(tmp_path, settings):
    model = trained_kinds(**settings)
    model.save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(kinds(), tmp_path)
    with torch.no_grad():
        expected = model(TOKENS)
        torch.testing.assert_close(plain(TOKENS), expected, atol=1e-5, rtol=1e-5)
        assert (expected - kinds()(TOKENS)).abs().max() > 1e-3
    tiny.assert_same_adapter(model, tiny.resume(kinds(), tmp_path))


def test_dora_keeps_its_magnitudes(tmp_path):
    model = tiny.train(tiny.milora(tiny.make("llama"), use_dora=True))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    assert any(name.endswith("lora_magnitude_vector") for name in load_file(tmp_path / WEIGHTS))
    plain = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
    torch.testing.assert_close(tiny.logits(plain), tiny.logits(model), atol=1e-5, rtol=1e-5)
    tiny.assert_same_adapter(model, tiny.resume(tiny.make("llama"), tmp_path))


SCRIPT = """
import sys
import peft, torch
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
model = peft.PeftModel.from_pretrained(base, sys.argv[2]).eval()
ids = torch.tensor(eval(sys.argv[3]))
with torch.no_grad():
    torch.Tensor.numpy(model(input_ids=ids).logits).tofile(sys.argv[4])
assert "rankwise" not in sys.modules
"""


def test_a_process_without_rankwise_computes_the_same(tmp_path):
    base = tiny.make("llama")
    base.save_pretrained(tmp_path / "base")
    model = tiny.train(tiny.milora(base, rank_pattern={"q_proj": 2}, use_rslora=True))
    model.save_pretrained(tmp_path / "adapter")
    ids, out = str(tiny.IDS.tolist()), tmp_path / "logits"
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "base"), str(tmp_path / "adapter"), ids, str(out)]
    subprocess.run(command, check=True, capture_output=True)
    expected = tiny.logits(model)
    found = torch.from_numpy(np.fromfile(out, dtype=np.float32)).reshape(expected.shape)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("low_memory", [False, True], ids=["whole", "low memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_resumes_with_the_same_next_steps_to_the_bit(tmp_path, monkeypatch, dtype, low_memory):
    model = tiny.milora(tiny.make("llama", dtype), part="middle")
    optimizer = optimiser(model)
    tiny.train(model, 2, optimizer)
    model.save_pretrained(tmp_path)
    optimizer_state = copy.deepcopy(optimizer.state_dict())

    def never(*_, **__):
        raise AssertionError("a resumed adapter decomposes nothing")

    monkeypatch.setattr(torch.linalg, "svd", never)
    monkeypatch.setattr(torch.linalg, "eigh", never)
    resumed = tiny.resume(tiny.make("llama", dtype), tmp_path, low_cpu_mem_usage=low_memory)
    assert resumed.peft_config["default"].part == "middle"
    tiny.assert_same_adapter(model, resumed)
    second = optimiser(resumed)
    second.load_state_dict(optimizer_state)
    tiny.train(model, 2, optimizer)
    tiny.train(resumed, 2, second)
    tiny.assert_same_adapter(model, resumed)
    assert torch.equal(tiny.logits(model), tiny.logits(resumed))


def test_saving_again_writes_the_same(tmp_path):
    tiny.train(tiny.milora(tiny.make("llama"), modules_to_save=["lm_head"])).save_pretrained(tmp_path / "first")
    tiny.resume(tiny.make("llama"), tmp_path / "first").save_pretrained(tmp_path / "second")
    assert (tmp_path / "first" / WEIGHTS).read_bytes() == (tmp_path / "second" / WEIGHTS).read_bytes()
    first, second = (json.loads((tmp_path / name / "milora.json").read_text()) for name in ("first", "second"))
    assert first["base"] == second["base"]
    assert first["config"] == second["config"]
    config = rw.MiloraConfig.from_pretrained(tmp_path / "second")
    assert (config.r, config.part, config.modules_to_save) == (4, "minor", ["lm_head"])


def test_adapters_are_saved_and_loaded_each_by_itself(tmp_path):
    model = tiny.train(tiny.milora(tiny.make("llama")))
    model.add_adapter("second", rw.MiloraConfig(r=3, part="principal", target_modules=["q_proj", "up_proj"]))
    model.set_adapter("second")
    tiny.train(model)
    model.save_pretrained(tmp_path)
    loaded = tiny.resume(tiny.make("llama"), tmp_path)
    assert tiny.resume(loaded, tmp_path / "second", adapter="second") is loaded
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        loaded.set_adapter(adapter)
        assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    tiny.assert_same_adapter(model, loaded)
    plain = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
    plain.load_adapter(tmp_path / "second", "second")
    plain.set_adapter("second")
    torch.testing.assert_close(tiny.logits(plain), tiny.logits(model), atol=1e-5, rtol=1e-5)


def test_a_shared_config_is_saved_with_the_base_of_each_model(tmp_path):
    """PEFT keeps the config object it is given: two models may hold one and the same."""
    config = rw.MiloraConfig(r=4, target_modules=tiny.TARGETS["llama"])
    first = peft.get_peft_model(tiny.make("llama"), config)
    other = tiny.make("llama")
    other.model.layers[0].self_attn.q_proj.weight.data.mul_(2)
    peft.get_peft_model(other, config)
    first.save_pretrained(tmp_path)
    tiny.assert_same_adapter(first, tiny.resume(tiny.make("llama"), tmp_path))


def test_training_where_a_trainer_narrowed_the_factors_is_saved_as_it_computes(tmp_path):
    """TRL casts the trained factors of a quantised model to bfloat16, the frozen start stays as it was."""
    model = tiny.milora(tiny.make("llama"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    plain = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
    torch.testing.assert_close(tiny.logits(plain), tiny.logits(tiny.make("llama")), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_second_adapter_in_one_step(tmp_path, trainable):
    tiny.train(tiny.milora(tiny.make("llama"), part="principal", modules_to_save=["lm_head"])).save_pretrained(tmp_path)
    expected = tiny.logits(tiny.resume(tiny.make("llama"), tmp_path))
    model = load_checkpoint(tiny.make("llama"), tmp_path, is_trainable=True)
    other = tiny.milora(tiny.make("llama"))
    assert load_checkpoint(other, tmp_path, "second", is_trainable=trainable, low_cpu_mem_usage=True) is other
    assert other.active_adapters == ["default"]
    trained = {name for name, parameter in other.named_parameters() if parameter.requires_grad}
    assert any(".second." in name for name in trained) is trainable
    assert any(".default." in name for name in trained)
    other.set_adapter("second")
    assert torch.equal(tiny.logits(other), expected) and torch.equal(tiny.logits(model), expected)


def test_a_second_adapter_that_cannot_be(tmp_path):
    tiny.milora(tiny.make("llama")).save_pretrained(tmp_path / "one")
    model = load_checkpoint(tiny.make("llama"), tmp_path / "one")
    with pytest.raises(UserError, match="adapter 'default' exists already"):
        load_checkpoint(model, tmp_path / "one")
    with pytest.raises(UserError, match=r"of kind LORA, and .*load this one as plain LoRA with model.load_adapter"):
        load_checkpoint(tiny.adapted("llama"), tmp_path / "one", "second")
    save_file({}, tmp_path / "one" / WEIGHTS)
    before = copy.deepcopy(model)
    with pytest.raises(UserError, match="lacks its LoRA matrices"):
        load_checkpoint(model, tmp_path / "one", "second")
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    tiny.assert_same_adapter(before, model)


def test_a_config_that_was_saved_by_itself_computes_its_start(tmp_path):
    config = rw.MiloraConfig(r=4, target_modules=tiny.TARGETS["llama"], part="middle")
    config.save_pretrained(tmp_path)
    again = rw.MiloraConfig.from_pretrained(tmp_path)
    assert (again.init_lora_weights, again.part) == (True, "middle")
    tiny.assert_same_adapter(
        peft.get_peft_model(tiny.make("llama"), config), peft.get_peft_model(tiny.make("llama"), again)
    )


@pytest.mark.parametrize("kept", ["weights", "hashes"])
def test_a_checkpoints_config_computes_no_start(tmp_path, kept):
    """Weights of a base that had no values to hash are enough, and so are hashes."""
    tiny.milora(tiny.make("llama")).save_pretrained(tmp_path)
    if kept == "hashes":
        (tmp_path / WEIGHTS).unlink()
    else:
        side = json.loads((tmp_path / "milora.json").read_text())
        (tmp_path / "milora.json").write_text(json.dumps(side | {"base": {}}))
    assert rw.MiloraConfig.from_pretrained(tmp_path).init_lora_weights is False


def test_an_adapter_that_was_never_filled_is_told_when_it_is_saved(tmp_path):
    tiny.train(tiny.milora(tiny.make("llama"))).save_pretrained(tmp_path / "first")
    empty = peft.get_peft_model(tiny.make("llama"), rw.MiloraConfig.from_pretrained(tmp_path / "first"))
    with pytest.warns(UserWarning, match="'default' was made with init_lora_weights=False and no checkpoint"):
        tiny.train(empty).save_pretrained(tmp_path / "second")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        filled = peft.get_peft_model(tiny.make("llama"), rw.MiloraConfig.from_pretrained(tmp_path / "first"))
        filled.load_adapter(tmp_path / "first", "default", is_trainable=True)
        filled.add_weighted_adapter(["default"], [0.5], "halved", combination_type="cat")
        filled.save_pretrained(tmp_path / "third")
        tiny.resume(tiny.make("llama"), tmp_path / "first").save_pretrained(tmp_path / "fourth")
