from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankwise.errors import UserError
from rankwise.recommend import load_template, template_names

GOOD = {
    "name": "mine",
    "description": "one of my own",
    "prompt": "Seen: {history}. Next:",
    "separator": ", ",
    "answer": " {title}",
}


def write(folder: Path, **changes: str | None) -> Path:
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in {**GOOD, **changes}.items() if value is not None]
    path = folder / "mine.yaml"
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["artists", "artists-candidates", "films", "films-candidates"])
def test_shipped_templates_render(name: str) -> None:
    template = load_template(name)
    prompt = template.render(["Alien", "Heat"], ["Jaws", "Speed"])
    assert template.name == name
    assert "Alien; Heat" in prompt
    assert ("Jaws; Speed" in prompt) == template.shows_candidates == name.endswith("-candidates")
    assert prompt == prompt.rstrip()
    assert template.render_answer("Jaws") == " Jaws"


def test_the_shipped_names_are_the_files() -> None:
    assert template_names() == ["artists", "artists-candidates", "films", "films-candidates"]


def test_a_users_own_template_is_read_from_its_path(tmp_path: Path) -> None:
    path = write(tmp_path, prompt="Seen: {history} {{of course}}\n  ")
    for given in (path, str(path)):
        assert load_template(given).render(["A", "B"]) == "Seen: A, B {of course}"


def test_titles_with_braces_are_only_text() -> None:
    assert load_template("films").render(["{history}", "{0}"]).count("{history}; {0}") == 1
    assert load_template("films").render_answer("{title}") == " {title}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "Seen: {histroy}"}, r"unknown placeholder \{histroy\} in prompt; did you mean 'history'"),
        ({"prompt": "Seen: {history} {}"}, r"unknown placeholder \{\} in prompt"),
        ({"prompt": "Seen: {history!r}"}, r"unknown placeholder \{history!r\}"),
        ({"prompt": "What next?"}, r"prompt has no \{history\}"),
        ({"prompt": "Seen: {history"}, "a brace that is meant is written twice"),
        ({"answer": " it"}, r"answer has no \{title\}"),
        ({"answer": "{title}"}, "must begin with a space"),
        ({"separator": ""}, "separator is empty"),
        ({"separator": None}, "separator = None must be a text"),
        ({"promt": "x"}, "unknown key 'promt'; did you mean 'prompt'"),
    ],
)
def test_a_wrong_template_is_one_clear_error(tmp_path: Path, changes: dict[str, str | None], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_template(write(tmp_path, **changes))


def test_an_unknown_name_gives_the_nearest_and_a_missing_file_is_said() -> None:
    with pytest.raises(UserError, match="unknown template 'film'; did you mean 'films'"):
        load_template("film")
    with pytest.raises(UserError, match="no such template file"):
        load_template("nowhere/mine.yaml")


def test_yaml_that_is_none_is_an_error_and_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    for text, message in (
        ("a: [", "no valid YAML"),
        ("- a", "must be a mapping"),
        ("!!python/object/apply:os.getcwd []", "no valid YAML"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_template(path)
