"""Recipes that somebody broke, or wrote to break the reader."""

from __future__ import annotations

import pytest

from rankwise.errors import UserError
from rankwise.recipes import load_recipe, make_recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000, "more than 32 lists and mappings within one another"),
        ("a: " + "{b: " * 40, "more than 32 lists and mappings within one another"),
        ("a: &a [1]\nb: [*a, *a]", "the alias *a is not read"),
        ("a: &a [*a]", "the alias *a is not read"),
        ("seed: !!int 1", "the tag tag:yaml.org,2002:int is not read"),
        (f"seed: {'9' * 5000}", "is no whole number of 64 bits"),
        (f"seed: 0x{'f' * 17}", "is no whole number of 64 bits"),
        ("seed: 0b_", "'0b_' is no whole number of 64 bits"),
        ('name: "\\ud800"', "surrogates not allowed"),
        ('name: "\\U00110000"', "is no valid YAML"),
        ('name: "\\UFFFFFFFF"', "is no valid YAML"),
        ("date: 2020-99-99", "is no valid YAML"),
        ("[1]: 2", "[1] is no key"),
        ("#" * 2**17 + "\n", "has more than 131072 bytes"),
        ('{output: "a\\0b", data: {kind: text, train: a}, stages: [{kind: sft}]}', "no file can have this name"),
        (
            f"{{output: {'a' * 256}, data: {{kind: text, train: a}}, stages: [{{kind: sft}}]}}",
            "no file can have this name",
        ),
        ("".join(f"k{n}: 1\n" for n in range(9000)), "data is missing"),
    ],
)
def test_broken_yaml_is_one_short_line(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 3000


@pytest.mark.parametrize("key", ["stages.²", f"stages.{'9' * 5000}", ".".join("a" * 40), f"stages.{'x' * 9999}"])
def test_a_broken_key_of_an_override_is_one_short_line(key):
    with pytest.raises(UserError) as caught:
        make_recipe({"stages": [{"kind": "sft"}]}, [f"{key}=1"])
    message = str(caught.value)
    assert "override" in message and len(message) < 600
