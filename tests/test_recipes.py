from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from rankwise.errors import UserError
from rankwise.recipes import dump_recipe, load_recipe, make_recipe
from rankwise.schema import MiloraSettings

TEXT = {"data": {"kind": "text", "train": "a.txt"}, "stages": [{"kind": "sft"}], "output": "runs/a"}
RANKING = {
    "adapter": {"kind": "sora", "r": 8, "gate_lr": 1e-2},
    "data": {"kind": "interactions", "interactions": "ratings.csv", "items": "films.csv", "negatives": 5},
    "stages": [
        {"kind": "sft", "epochs": 2},
        {"kind": "softmax_dpo", "name": "dpo", "negatives": 1, "learning_rate": 1e-5},
        {"kind": "softmax_dpo", "name": "three", "start": "sft", "beta": 0.1},
    ],
    "export": {"energy": 0.99, "layout": "compact"},
    "output": "runs/b",
    "seed": 7,
}


def changed(values: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a place such as "stages.0.epochs"; `...` removes it."""
    made = copy.deepcopy(values)
    *path, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    section: Any = made
    for key in path:
        section = section[key]
    if value is ...:
        del section[last]
    elif isinstance(section, list) and last == len(section):
        section.append(value)
    else:
        section[last] = value
    return made


def mistake(values: dict[str, Any], *overrides: str) -> str:
    """The one-line message of the error that a recipe gives."""
    with pytest.raises(UserError) as caught:
        make_recipe(copy.deepcopy(values), overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_minimal_recipe_and_its_defaults():
    recipe = make_recipe(copy.deepcopy(TEXT))
    assert isinstance(recipe.adapter, MiloraSettings) and recipe.adapter.part == "minor"
    assert recipe.model.path == "embedded" and recipe.seed == 0 and recipe.precision == "float32"
    assert [(stage.name, stage.epochs) for stage in recipe.stages] == [("sft", 1.0)]
    assert recipe.data.train == "a.txt" and recipe.export.layout == "uniform"


@pytest.mark.parametrize("values", [TEXT, RANKING], ids=["text", "ranking"])
def test_a_dumped_recipe_makes_the_same_one(tmp_path, values):
    recipe = make_recipe(copy.deepcopy(values))
    text = dump_recipe(recipe)
    assert make_recipe(yaml.safe_load(text)) == recipe
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert dump_recipe(load_recipe(tmp_path / "recipe.yaml")) == text


def test_stages_are_named_by_their_kind_and_may_start_from_an_earlier_one():
    recipe = make_recipe(copy.deepcopy(RANKING))
    assert [stage.name for stage in recipe.stages] == ["sft", "dpo", "three"]
    assert [stage.start for stage in recipe.stages] == [None, None, "sft"]


def test_an_environment_variable_that_is_not_set_is_told(monkeypatch):
    monkeypatch.setenv("FILMS", "films")
    monkeypatch.delenv("NO_FILMS", raising=False)
    values = copy.deepcopy(TEXT)
    values["data"]["train"] = "$FILMS/a.txt"
    assert make_recipe(values).data.train == "films/a.txt"
    values["data"]["train"] = "$NO_FILMS/a.txt"
    with pytest.raises(UserError, match=r"data.train '\$NO_FILMS/a.txt': an environment variable in it is not set"):
        make_recipe(values)


def test_a_recipe_cannot_be_changed():
    recipe = make_recipe(copy.deepcopy(TEXT))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        # unknown keys, at each depth, with the nearest known one
        ("sead", 1, "sead is unknown: did you mean 'seed'?"),
        (
            "xyz",
            1,
            "xyz is unknown: known: adapter, checkpoint_seconds, data, deterministic, evaluation",
        ),
        ("adapter", {"kind": "sora", "thresold": 1}, "adapter.thresold is unknown: did you mean 'threshold'?"),
        ("adapter", {"kind": "lora", "part": "minor"}, "adapter.part is unknown: known: alpha, dropout, kind"),
        ("data.colum", "text", "data.colum is unknown: did you mean 'column'?"),
        ("data.sentence1", "a", "data.sentence1 is unknown"),
        ("stages.0.epoch", 2, "stages.0.epoch is unknown: did you mean 'epochs'?"),
        ("stages.0.beta", 2, "stages.0.beta is unknown"),
        ("model", {"pth": "x"}, "model.pth is unknown: did you mean 'path'?"),
        ("export", {"ranks": 2}, "export.ranks is unknown: did you mean 'rank'?"),
        # unknown and missing kinds
        ("adapter", {"kind": ["lora"]}, "adapter.kind ['lora'] is no text"),
        ("adapter", {"kind": "milra"}, "adapter.kind 'milra' is unknown: did you mean 'milora'?"),
        ("data.kind", "interaction", "data.kind 'interaction' is unknown: did you mean 'interactions'?"),
        ("stages.0.kind", "dpo", "stages.0.kind 'dpo' is unknown: "),
        ("data.kind", ..., "data.kind is missing"),
        ("stages.0.kind", ..., "stages.0.kind"),
        # what does not go together
        (
            "adapter",
            {"kind": "sora", "use_dora": True},
            "adapter {'kind': 'sora', 'use_dora': True}: use_dora is not for SoRA",
        ),
        (
            "adapter",
            {"kind": "sora", "lora_plus_ratio": 2},
            "adapter {'kind': 'sora', 'lora_plus_ratio': 2}: lora_plus_",
        ),
        # missing
        ("data.train", ..., "data.train is missing"),
        ("data", ..., "data is missing"),
        ("output", ..., "output is missing"),
        ("stages", ..., "stages is missing"),
        # wrong types and values
        ("stages.0.epochs", -1, "stages.0.epochs -1: Input should be greater than 0"),
        ("stages.0.epochs", 0, "stages.0.epochs 0: Input should be greater than 0"),
        ("stages.0.epochs", "many", "stages.0.epochs 'many': Input should be a valid number"),
        ("stages.0.epochs", float("inf"), "stages.0.epochs inf: Input should be a finite number"),
        ("stages.0.learning_rate", float("nan"), "stages.0.learning_rate nan: "),
        ("stages.0.batch_size", 2.5, "stages.0.batch_size 2.5: Input should be a valid integer"),
        ("stages.0.warmup", 1, "stages.0.warmup 1: Input should be less than 1"),
        ("stages.0.schedule", "cos", "stages.0.schedule 'cos' is unknown: did you mean 'cosine'?"),
        ("stages.0.name", "a/b", "stages.0.name 'a/b': "),
        ("stages", [], r"stages []: List should have at least 1 item"),
        ("stages", {}, "stages {}: Input should be a valid list"),
        ("data", "a.txt", "data 'a.txt': Input should be a valid dictionary"),
        ("data.holdout", 1.0, "data.holdout 1.0: Input should be less than 1"),
        ("adapter", {"kind": "lora", "r": 0}, "adapter.r 0: Input should be greater than or equal to 1"),
        ("adapter", {"kind": "milora", "part": "minr"}, "adapter.part 'minr' is unknown: did you mean 'minor'?"),
        ("adapter", {"kind": "lora", "target_modules": None}, "adapter.target_modules None: Input should be a valid s"),
        ("adapter", {"kind": "vera", "target_modules": []}, "adapter.target_modules []: List should have at least 1"),
        ("adapter", {"kind": "bottleneck", "target_modules": []}, "adapter.target_modules []: List should have at l"),
        ("adapter", {"kind": "lora", "target_modules": [1]}, "adapter.target_modules.0 1: Input should be a valid s"),
        ("export", {"energy": 1.5}, "export.energy 1.5: Input should be less than or equal to 1"),
        ("evaluation", {"cases": 0}, "evaluation.cases 0: "),
        ("seed", -1, "seed -1: "),
        ("seed", 2**32, "seed 4294967296: "),
        ("precision", "float16", "precision 'float16' is unknown: did you mean 'bfloat16'?"),
        # stages that do not fit
        ("stages.1", {"kind": "sft"}, "stages.1.name 'sft' occurs twice, letters' case aside: name each stage"),
        ("stages.1", {"kind": "sft", "name": "SFT"}, "stages.1.name 'SFT' occurs twice, letters' case aside"),
        ("stages.0.name", "sasrec", "stages.0.name 'sasrec' is a name of the result table: choose another"),
        ("stages.0.name", "Random", "stages.0.name 'Random' is a name of the result table: choose another"),
        ("stages.0.name", "Con", "stages.0.name 'Con': Windows takes no file of the name 'Con': choose another"),
        ("stages.0.name", "lpt1.a", "stages.0.name 'lpt1.a': Windows takes no file of the name 'lpt1.a'"),
        ("stages.0.name", "a.", "stages.0.name 'a.': Windows takes no file of the name 'a.'"),
        ("stages.0.start", "sft", "stages.0.start 'sft' is no earlier stage; possible: nothing: no stage is before it"),
        (
            "stages",
            [{"kind": "sft", "start": "late"}, {"kind": "sft", "name": "late"}],
            "stages.0.start 'late' is no earlier stage",
        ),
        (
            "stages.1",
            {"kind": "sft", "name": "b", "start": "c"},
            "stages.1.start 'c' is no earlier stage; possible: one of sft",
        ),
        (
            "stages.1",
            {"kind": "softmax_dpo"},
            "stages.1.kind softmax_dpo needs data of kind interactions, sdpo, pref",
        ),
    ],
)
def test_a_mistake_is_one_clear_line(place, value, message):
    assert f"recipe: {message}" in mistake(changed(TEXT, place, value))


SORA = TEXT | {"adapter": {"kind": "sora"}}


@pytest.mark.parametrize(
    ("thresholds", "expected"),
    [
        ([1e-4, 1e-4, 3e-4], [1e-4, 1e-4, 3e-4]),
        ([0], [0.0]),
        ({"largest": 6e-4, "stages": 4}, [0.0, 2e-4, 4e-4, 6e-4]),
        ({"largest": 8e-4, "stages": 4, "spacing": "exp-linear", "smallest": 1e-4}, [1e-4, 2e-4, 4e-4, 8e-4]),
    ],
)
def test_thresholds_are_written_out_as_stages(thresholds, expected):
    """Each has its threshold and starts from the one before; all else is the stage's; what follows may name them."""
    own = {"kind": "sft", "name": "sparse", "start": "dense", "epochs": 3, "thresholds": thresholds}
    last = f"sparse-{len(expected)}"
    more = {"kind": "sft", "name": "more", "start": last, "threshold": 0.5}
    recipe = make_recipe(SORA | {"stages": [{"kind": "sft", "name": "dense"}, own, more]})
    dense, *sparse, after = recipe.stages
    assert (dense.name, dense.threshold, after.start, after.threshold) == ("dense", None, last, 0.5)
    assert [stage.threshold for stage in sparse] == pytest.approx(expected)
    assert [stage.name for stage in sparse] == [f"sparse-{at + 1}" for at in range(len(expected))]
    assert [stage.start for stage in sparse] == ["dense", *(stage.name for stage in sparse[:-1])]
    assert {(stage.epochs, stage.thresholds) for stage in sparse} == {(3.0, None)}
    assert make_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"thresholds": []}, "stages.0.thresholds []: there is no threshold in it: give one or more"),
        ({"thresholds": [2, 1]}, "stages.0.thresholds [2, 1]: 1.0 stands after 2.0: thresholds must not fall"),
        ({"thresholds": [1, -1]}, "stages.0.thresholds.1 -1: Input should be greater than or equal to 0"),
        ({"thresholds": ["a"]}, "stages.0.thresholds.0 'a': Input should be a valid number"),
        ({"thresholds": 3}, "stages.0.thresholds 3: Input should be a valid list"),
        ({"thresholds": {"largest": 1}}, "stages.0.thresholds.stages is missing"),
        ({"thresholds": {"largest": -1, "stages": 2}}, "stages.0.thresholds.largest -1: Input should be greater"),
        ({"thresholds": {"largest": 1, "stages": 2, "list": 3}}, "stages.0.thresholds.list is unknown: known: largest"),
        ({"thresholds": {"largest": 1, "stags": 2}}, "stages.0.thresholds.stages is missing"),
        (
            {"thresholds": {"largest": 1, "stages": 2, "spacing": "cubic"}},
            "stages.0.thresholds.spacing 'cubic' is unknown: known: exp-linear, linear, log-linear",
        ),
        (
            {"thresholds": {"largest": 1, "stages": 2, "spacing": "exp-linear"}},
            "smallest 0 has no exp-linear spacing, which rises by a constant ratio: give one above 0",
        ),
        (
            {"thresholds": {"largest": 1, "stages": 2, "smallest": 3}},
            "largest 1.0 is below smallest 3.0: thresholds rise from stage to stage",
        ),
        ({"threshold": -1}, "stages.0.threshold -1: Input should be greater than or equal to 0"),
        ({"threshold": 1, "thresholds": [1]}, "threshold and thresholds are both given: leave one of them out"),
    ],
)
def test_mistakes_in_thresholds(stage, message):
    assert message in mistake(SORA | {"stages": [{"kind": "sft"} | stage]})


def test_thresholds_that_do_not_fit_the_rest():
    for name, value in (("threshold", 0.1), ("thresholds", [0.1, 0.2]), ("thresholds", {"largest": 1, "stages": 2})):
        stages = {"stages": [{"kind": "sft", name: value}]}
        assert f"stages.0.{name} is for adapters of kind sora, not milora: leave it out" in mistake(TEXT | stages)
        for budget in ({"target_ratio": 0.5}, {"target_parameters": 100}):
            found = mistake(SORA | stages | {"adapter": {"kind": "sora"} | budget})
            assert f"stages.0.{name}: the adapter has a budget instead: leave out one of them" in found
    several = {"kind": "sft", "thresholds": [0.1, 0.2]}
    twice = [several, {"kind": "sft", "name": "sft-2"}]
    assert "stages.1.name 'sft-2' occurs twice" in mistake(SORA | {"stages": twice})
    lost = [several, {"kind": "sft", "name": "b", "start": "sft"}]
    expected = "stages.1.start 'sft' is no earlier stage; possible: one of sft-1, sft-2"
    assert expected in mistake(SORA | {"stages": lost})
    assert "stages.0.thresholds is unknown" in mistake(changed(RANKING, "stages.0", several | RANKING["stages"][1]))


def test_training_rows_are_measured_where_they_compare():
    assert make_recipe(TEXT | {"evaluation": {"training_cases": 7}}).evaluation.training_cases == 7
    found = mistake(RANKING | {"evaluation": {"training_cases": 7}})
    assert "evaluation.training_cases is not for data of kind interactions, whose training rows have other" in found
    assert "evaluation.training_cases 0: " in mistake(TEXT | {"evaluation": {"training_cases": 0}})


def test_more_negatives_than_the_data_gives():
    assert "recipe: stages.1.negatives 6 is more than data.negatives" in mistake(
        changed(RANKING, "stages.1.negatives", 6)
    )
    make_recipe(changed(RANKING, "stages.1.negatives", 5))
    assert "recipe: stages.1.negatives 0: Input should be greater" in mistake(changed(RANKING, "stages.1.negatives", 0))
    found = mistake(changed(RANKING, "stages.1.negatives", [1, 0]))
    assert "recipe: stages.1.negatives.1 0: Input should be greater" in found


def test_the_source_is_named(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(changed(TEXT, "sead", 1)))
    with pytest.raises(UserError, match=r"mine\.yaml: sead is unknown"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("stages.0.epochs=3", lambda r: r.stages[0].epochs, 3.0),
        ("stages.0.learning_rate=2e-4", lambda r: r.stages[0].learning_rate, 2e-4),
        ("stages.2.start=dpo", lambda r: r.stages[2].start, "dpo"),
        ("export.rank=4", lambda r: r.export.rank, 4),
        ("export.energy=null", lambda r: r.export.energy, None),
        ("evaluation.generate=false", lambda r: r.evaluation.generate, False),
        ("adapter.target_modules=[q_proj, v_proj]", lambda r: r.adapter.target_modules, ["q_proj", "v_proj"]),
        ("output=a=b", lambda r: r.output, "a=b"),
        ("stages.1={kind: sft, name: more}", lambda r: r.stages[1].name, "more"),
        ("model.path=folder", lambda r: r.model.path, "folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # a function's own name would hold its address
)
def test_overrides(override, read, expected):
    assert read(make_recipe(copy.deepcopy(RANKING), [override])) == expected
    assert read(make_recipe(copy.deepcopy(RANKING))) != expected


def test_later_overrides_win():
    assert make_recipe(copy.deepcopy(TEXT), ["seed=3", "seed=4"]).seed == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.epochs", "override 'stages.0.epochs' has no '=': write it as key=value"),
        ("stages.1.epochs=2", "'1' is no position in a list of 1, counted from 0"),
        ("stages.-1.epochs=2", "'-1' is no position in a list of 1"),
        ("stages.first.epochs=2", "'first' is no position in a list of 1"),
        ("stages.1={kind: sft}", "'1' is no position in a list of 1"),
        ("output.folder=x", "override 'output.folder=x': 'output' holds a value, no mapping or list"),
        ("seed=[1", "override 'seed=[1' is no valid YAML"),
        (
            "seed=!!python/name:os.system ''",
            "is no valid YAML: the tag tag:yaml.org,2002:python",
        ),
        ("sed=1", "sed is unknown: did you mean 'seed'?"),
        ("stages.0.epochs=-2", "stages.0.epochs -2: Input should be greater than 0"),
    ],
)
def test_mistakes_in_overrides(override, message):
    assert message in mistake(TEXT, override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: [1", "is no valid YAML: while parsing a flow sequence"),
        ("output: !!python/object/apply:os.system ['touch x']", "is no valid YAML: the tag tag:yaml.org,2002:python"),
        ("", "is no mapping: it needs the keys name, model, adapter, data, stages"),
        ("- output", "is no mapping"),
        ("just words", "is no mapping"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match=f"recipe {path} does not exist: give the path of a YAML file"):
            load_recipe(path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("lora", {}, "recipe: lora is unknown: "),
        ("sft", {}, "recipe: sft is unknown: "),
        ("data.text", "a.txt", "recipe: data.text is unknown: "),
        ("stages.0.sft", 1, "recipe: stages.0.sft is unknown: "),
    ],
)
def test_an_unknown_key_with_the_name_of_a_kind(place, value, message):
    assert message in mistake(changed(TEXT, place, value))


@pytest.mark.parametrize("name", ["..", ".", ""])
def test_a_stage_whose_name_is_no_folder(name):
    """Stages write into stages/<name>."""
    assert "stages.0.name" in mistake(changed(TEXT, "stages.0.name", name))


def test_a_key_that_occurs_twice(tmp_path):
    """YAML keeps the last one and says nothing."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(TEXT) + "seed: 1\nseed: 2\n")
    with pytest.raises(UserError, match="seed"):
        load_recipe(tmp_path / "recipe.yaml")


def test_a_file_in_another_encoding(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes("name: Müller\n".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        load_recipe(tmp_path / "recipe.yaml")


def test_an_override_of_the_default_adapter():
    """The default adapter is MiLoRA, so its rank can be set without a section for it."""
    recipe = make_recipe(copy.deepcopy(TEXT), ["adapter.r=4"])
    assert isinstance(recipe.adapter, MiloraSettings) and recipe.adapter.r == 4


def test_overrides_leave_the_given_values_alone():
    values = copy.deepcopy(TEXT)
    make_recipe(values, ["seed=3", "stages.0.epochs=2"])
    assert values == TEXT
