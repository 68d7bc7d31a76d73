"""What AdaLoRA's allocation refuses before a training begins."""

from __future__ import annotations

import peft
import pytest
from torch import nn

import tiny
import tiny_adalora
import tiny_modules
from rankwise.errors import UserError
from rankwise.ranks import AdaloraAllocation
from tiny_adalora import STEPS, adapt


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_step": 9}, r"total_step=9\) is not what training takes, which is 14 .* adapter with total_step=14"),
        ({"init_r": 2}, r"target_r=2, init_r=2\) leaves nothing to cut"),
        ({"target_r": 5}, r"target_r=5, init_r=4\) leaves nothing to cut"),
        ({"use_rslora": True}, r"use_rslora=True\) would be ignored"),
        ({"alpha_pattern": {"q_proj": 3}}, r"alpha_pattern=.* would be ignored"),
        ({"lora_bias": True}, r"lora_bias=True\) is not available"),
    ],
)
def test_settings(settings, message):
    model = adapt(**settings)
    with pytest.raises(UserError, match=message):
        AdaloraAllocation(model, STEPS)


def test_a_schedule_changed_by_hand():
    model = adapt()
    model.peft_config["default"].tinit = 10
    with pytest.raises(UserError, match=r"tinit=10, tfinal=4\) leaves none of 14 steps"):
        AdaloraAllocation(model, STEPS)


def test_other_adapters(tmp_path):
    with pytest.raises(UserError, match="is of LoraConfig: this is for"):
        AdaloraAllocation(tiny.adapted("llama"), STEPS)
    model = tiny_adalora.peft_loop(adapt())
    with pytest.raises(UserError, match="its ranks were allocated before"):
        AdaloraAllocation(model, STEPS)
    model.save_pretrained(tmp_path)
    for_inference = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
    with pytest.raises(UserError, match="loaded for inference: load it with is_trainable=True"):
        AdaloraAllocation(for_inference, STEPS)
    to_train = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path, is_trainable=True)
    with pytest.raises(UserError, match="its ranks were allocated before"):
        AdaloraAllocation(to_train, STEPS)


def test_names_that_peft_would_mistake():
    model = peft.get_peft_model(tiny.make("llama"), tiny_adalora.config(), adapter_name="mlp")
    with pytest.raises(UserError, match=r"adapter name 'mlp' is also a part of 'model\.layers\.0\.mlp\.down_proj'"):
        AdaloraAllocation(model, STEPS)
    model = peft.get_peft_model(tiny.make("llama"), tiny_adalora.config(), adapter_name="one")
    model.add_adapter("one_more", tiny_adalora.config(inference_mode=True))
    with pytest.raises(UserError, match="adapter name 'one' is also a part of 'one_more'"):
        AdaloraAllocation(model, STEPS)


def test_grouped_convolutions():
    base = tiny_modules.One(nn.Conv2d(4, 6, 2, groups=2))
    model = peft.get_peft_model(base, tiny_adalora.config(target_modules=["only"], task_type=None))
    with pytest.raises(UserError, match="only: AdaLoRA cannot adapt a convolution of several groups"):
        AdaloraAllocation(model, STEPS)
