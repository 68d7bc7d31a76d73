"""Names in ``target_modules``: each must be of a module, in an adapter that is made anew."""

from __future__ import annotations

import json

import peft
import pytest
import torch

import rankwise as rw
import tiny
import tiny_starts
from rankwise.directions import initialise
from rankwise.errors import UserError

CONFIGS = [rw.MiloraConfig, rw.SoraConfig]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "vproj"], "target_modules 'vproj' matches no module of the model: did you mean 'v_proj'"),
        (["layers.9.mlp.up_proj", "q_proj"], r"'layers\.9\.mlp\.up_proj' .*did you mean 'layers\..\.mlp\.up_proj'"),
        (["proj"], "target_modules 'proj' matches no module"),
        (["zzz", "v_proj"], "target_modules 'zzz' .*known: act_fn, .*, v_proj"),
    ],
    ids=str,
)
def test_a_name_that_matches_nothing_is_an_error(config, targets, message):
    base = tiny.make("llama")
    with pytest.raises(UserError, match=message):
        peft.get_peft_model(base, config(r=2, target_modules=targets))
    assert not tiny.layers(base)
    model = peft.get_peft_model(base, config(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=message):
        model.add_adapter("second", config(r=2, target_modules=targets))
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, 3),
        ({"target_modules": ["model.layers.1.self_attn.q_proj", "mlp.up_proj"]}, 3),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, 2),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}, 2),
        ({"target_modules": r".*\.(q_proj|vproj)"}, 2),
    ],
    ids=str,
)
def test_names_that_are_there(config, settings, count):
    model = peft.get_peft_model(tiny.make("llama"), config(r=2, **settings))
    assert len(tiny.layers(model)) == count
    second = config(r=2, target_modules=settings["target_modules"])
    model.add_adapter("second", second)  # names are those of the base, also where it is adapted already


def test_a_start_from_files_checks_the_names_too(tmp_path):
    base = tiny_starts.saved(tmp_path / "base")
    with pytest.raises(UserError, match="target_modules 'vproj' matches no module of the model"):
        initialise(str(base), tmp_path / "start", tiny_starts.settings(target_modules=["q_proj", "vproj"]))
    assert not (tmp_path / "start").exists()


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_saved_adapter_is_loaded_by_its_list(tmp_path, config, is_trainable):
    """Also by one that was saved with a name of no module; of SoRA, which has no mark of a checkpoint, to use it."""
    model = tiny.adapted("llama", config)
    model.save_pretrained(tmp_path)
    file = tmp_path / ("milora.json" if config is rw.MiloraConfig else "adapter_config.json")
    settings = json.loads(file.read_text())
    held = settings["config"] if config is rw.MiloraConfig else settings
    assert sorted(held["target_modules"]) == sorted(tiny.TARGETS["llama"])
    if config is rw.MiloraConfig or not is_trainable:
        held["target_modules"].append("vproj")
        file.write_text(json.dumps(settings))
    if config is rw.MiloraConfig:
        loaded = tiny.resume(tiny.make("llama"), tmp_path, is_trainable=is_trainable)
    else:
        loaded = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path, is_trainable=is_trainable)
    torch.testing.assert_close(tiny.logits(loaded.eval()), tiny.logits(model.eval()))
