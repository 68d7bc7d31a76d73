from __future__ import annotations

import importlib
import json
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import rankwise as rw
import tiny
from rankwise.directions.basehash import base_hash
from rankwise.directions.dequantise import dense_weight
from rankwise.directions.streaming import initialise
from rankwise.errors import UserError

KINDS = ["nf4", "nf4-nested", "int8-bitsandbytes", "int8-torchao"]
TARGETS = ["q_proj", "v_proj", "down_proj"]
# The relative error of a weight's codes: a sixteenth of a block's range, or 1 / 254 of a row's largest magnitude.
ROUNDING = {"nf4": 0.12, "nf4-nested": 0.12, "int8-bitsandbytes": 0.02, "int8-torchao": 0.02}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose matrices are large enough to be quantised in blocks of 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.05,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("original")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def wanted(name: str) -> None:
    """Skip where a library is missing or cannot work here, with its own reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            pytest.skip(f"{name} cannot be imported: {error}")


def quantisation(kind: str) -> object:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "int8-torchao":
        wanted("torchao.quantization")
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(quant_type=Int8WeightOnlyConfig())
    wanted("bitsandbytes")
    if kind == "int8-bitsandbytes":
        return BitsAndBytesConfig(load_in_8bit=True)
    nested = kind.endswith("nested")
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=nested, **four)


def packed(source: Path, kind: str) -> PreTrainedModel:
    """The model with its matrices packed.

    In training mode, since bitsandbytes repacks a 4 bit weight for good, with rounder scales, when it first computes
    in evaluation mode on a CPU. The model has no dropout.
    """
    loaded = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=quantisation(kind), dtype=torch.float32, device_map="cpu"
    )
    return loaded.train()


def stored(model: nn.Module) -> dict[str, list[Tensor]]:
    """The bytes of every packed weight and of its scales."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    found = {}
    for name, module in base.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and "lora" not in name:
            found[name.replace(".base_layer", "")] = [part.clone() for part in parts(module, weight)]
    return found


def parts(module: nn.Module, weight: Tensor) -> list[Tensor]:
    if hasattr(weight, "__tensor_flatten__"):
        return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    state = getattr(weight, "quant_state", None)
    scale = getattr(weight, "SCB", None)
    if scale is None:
        scale = getattr(getattr(module, "state", None), "SCB", None)
    return [weight.data, *([state.absmax] if state is not None else []), *([scale] if scale is not None else [])]


def same(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> bool:
    pairs = [zip(one[name], other[name], strict=True) for name in one]
    return one.keys() == other.keys() and all(torch.equal(a, b) for pair in pairs for a, b in pair)


@pytest.mark.parametrize("computed", [False, True], ids=["fresh", "after a pass"])
@pytest.mark.parametrize("kind", KINDS)
def test_unpacks_without_touching_the_layer(source, kind, computed):
    """Against the original weight, within the rounding of its codes; the layer computes the same afterwards."""
    model = packed(source, kind)
    expected = tiny.logits(model) if computed else None
    before = stored(model)
    original = LlamaForCausalLM.from_pretrained(source)
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        dense = dense_weight(model.get_submodule(name)).float()
        weight = original.get_submodule(name).weight.detach()
        error = float((dense - weight).norm() / weight.norm())
        assert 0 < error < ROUNDING[kind]
    assert same(stored(model), before)
    if computed:
        assert torch.equal(tiny.logits(model), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_has_computed_in_evaluation_mode_is_still_read_rightly(source, kind):
    """There bitsandbytes has packed 4 bit weights anew on some CPUs; scales are then rounded to bfloat16."""
    model = packed(source, kind)
    name = "model.layers.1.mlp.down_proj"
    before = dense_weight(model.get_submodule(name)).float()
    tiny.logits(model.eval())
    after = dense_weight(model.get_submodule(name)).float()
    torch.testing.assert_close(after, before, atol=1e-2 * float(before.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_quantised_base_and_trains(source, kind):
    """Output as the base's to the bit; packed weights as they were, before and after training; the loss falls."""
    base = packed(source, kind)
    expected, before = tiny.logits(base), stored(base)
    model = peft.get_peft_model(base, rw.MiloraConfig(r=4, target_modules=TARGETS)).train()
    assert len(tiny.layers(model)) == 6
    assert torch.equal(tiny.logits(model), expected)
    layer = tiny.layers(model)["model.layers.1.mlp.down_proj"]
    dense = dense_weight(layer.get_base_layer()).double()
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    start = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    assert float((start - (u[:, -4:] * s[-4:]) @ vh[-4:]).abs().max()) < 1e-4 * float(s[0])
    loss = tiny.loss(model).item()
    tiny.train(model, steps=4)
    assert tiny.loss(model).item() < loss
    assert same(stored(model), before)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_from_the_original_checkpoint_trains_on_the_quantised_base(tmp_path, source, kind):
    """The directions are those of the weights before quantisation, the function at the start is the packed base's."""
    initialise(str(source), tmp_path / "start", rw.MiloraConfig(r=4, target_modules=TARGETS))
    base = packed(source, kind)
    expected, before = tiny.logits(base), stored(base)
    with pytest.warns(UserWarning, match="another dtype"):
        config = rw.MiloraConfig.from_pretrained(tmp_path / "start")
        model = peft.PeftModel.from_pretrained(base, tmp_path / "start", config=config, is_trainable=True).train()
    assert torch.equal(tiny.logits(model), expected)
    whole = peft.get_peft_model(LlamaForCausalLM.from_pretrained(source), rw.MiloraConfig(r=4, target_modules=TARGETS))
    theirs, ours = peft.get_peft_model_state_dict(whole), peft.get_peft_model_state_dict(model)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    loss = tiny.loss(model).item()
    tiny.train(model, steps=4)
    assert tiny.loss(model).item() < loss
    assert same(stored(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_after_loading(tmp_path, source, kind):
    model = peft.get_peft_model(packed(source, kind), rw.MiloraConfig(r=4, target_modules=TARGETS)).train()
    tiny.train(model, steps=2)
    expected = tiny.logits(model)
    model.save_pretrained(tmp_path)
    config = rw.MiloraConfig.from_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(packed(source, kind), tmp_path, config=config, is_trainable=True).train()
    assert torch.equal(tiny.logits(loaded), expected)


@pytest.mark.parametrize("computed", [False, True], ids=["fresh", "after a pass"])
@pytest.mark.parametrize("kind", KINDS)
def test_scales_belong_to_a_packed_base(tmp_path, source, kind, computed):
    """Twice the weights have the same codes and twice the scales; the first pass of an 8 bit layer moves its scales."""
    doubled = LlamaForCausalLM.from_pretrained(source)
    for module in doubled.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= 2
    doubled.save_pretrained(tmp_path / "doubled")
    base = packed(source, kind)
    if computed:
        tiny.logits(base)
    peft.get_peft_model(base, rw.MiloraConfig(r=4, target_modules=TARGETS)).save_pretrained(tmp_path / "start")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*base weights.*")
        tiny.resume(packed(source, kind), tmp_path / "start")
    with pytest.raises(UserError, match=r"q_proj: the base weight is not the one .*\(6 of 6 weights differ\)"):
        tiny.resume(packed(tmp_path / "doubled", kind), tmp_path / "start")


def test_a_base_packed_elsewhere_is_said_not_to_be_comparable(tmp_path, source):
    """Another version of a library, or another device, may round scales in another way."""
    model = peft.get_peft_model(packed(source, "nf4"), rw.MiloraConfig(r=4, target_modules=TARGETS))
    model.save_pretrained(tmp_path)
    side = json.loads((tmp_path / "milora.json").read_text())
    kind, digest = next(iter(side["base"].values())).split(":")
    assert re.fullmatch(r"Params4bit uint8 bitsandbytes [0-9.]+ cpu", kind)
    side["base"] = {name: f"{kind.replace('cpu', 'cuda')}:{digest[::-1]}" for name in side["base"]}
    (tmp_path / "milora.json").write_text(json.dumps(side))
    with pytest.warns(UserWarning, match="6 of 6 base weights have another dtype or packing"):
        tiny.resume(packed(source, "nf4"), tmp_path)


def test_a_weight_packed_anew_for_inference_has_no_hash(source):
    module = packed(source, "nf4").get_submodule("model.layers.0.self_attn.v_proj")
    assert base_hash(module) is not None
    module.weight.quant_state.packing_format_for_cpu = True
    assert base_hash(module) is None


class Packed(nn.Module):
    """A layer packed in a way that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.qweight = torch.zeros(4, 4, dtype=torch.int32)


class Codes(nn.Module):
    """A layer whose weight is a table of codes."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(4, 4).to(dtype))


@pytest.mark.parametrize(
    "module", [Packed(), Codes(torch.int8), Codes(torch.float8_e4m3fn)], ids=["qweight", "int8", "float8"]
)
def test_a_layer_without_a_dequantiser_is_refused(module):
    with pytest.raises(UserError, match=r"cannot be unpacked here.*rankwise init"):
        dense_weight(module)


def test_a_weight_without_values_is_refused():
    with pytest.raises(UserError, match=r"meta device.*rankwise init"):
        dense_weight(nn.Linear(4, 4, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_full_precision_weight_is_itself(dtype):
    layer = nn.Linear(4, 3).to(dtype)
    dense = dense_weight(layer)
    assert dense.data_ptr() == layer.weight.data_ptr() and not dense.requires_grad
