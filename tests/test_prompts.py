from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from rankwise.errors import UserError
from rankwise.recommend import load_template, template_names
from rankwise.recommend.chats import as_chat

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


def test_a_history_tells_ratings_and_columns_of_the_items(tmp_path: Path) -> None:
    template = load_template(write(tmp_path, item="{title} ({genres}; rated {rating})", unknown="?"))
    assert template.attributes == ("genres",)
    assert template.shows_ratings
    about = {"A": {"genres": "Drama {x}"}, "B": {"genres": None}}
    assert template.render(["A", "B", "C"], about=about, ratings=[4.0, 3.5, None]) == (
        "Seen: A (Drama {x}; rated 4), B (?; rated 3.5), C (?; rated ?). Next:"
    )
    assert template.render(["A"], about=about) == "Seen: A (Drama {x}; rated ?). Next:"
    plain = load_template("films")
    assert plain.attributes == ()
    assert not plain.shows_ratings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item": "{title} {popularity}"}, "a column 'popularity' cannot be told in item"),
        ({"item": "a film"}, r"item has no \{title\}"),
        ({"item": "{title} {release year}"}, r"\{release year\} in item is no name of a column"),
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
    with pytest.raises(UserError, match=r"template nowhere/mine\.yaml does not exist: give the path of a YAML file"):
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


CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>\n{{ message['content'] | trim }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def test_a_template_becomes_a_chat(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    template = load_template(write(tmp_path, prompt="Seen: {history} {{of course}}"))
    with pytest.raises(UserError, match=r"data\.chat holds chats, and the tokenizer has no chat template"):
        as_chat(template, tokenizer)
    tokenizer.chat_template = CHAT
    chat = as_chat(template, tokenizer)
    for title in ("Heat", "{title}", "The {0}"):
        messages = [
            {"role": "user", "content": template.render([title, "B"])},
            {"role": "assistant", "content": title},
        ]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        assert chat.render([title, "B"]) + chat.render_answer(title) == whole.rstrip()
    tokenizer.chat_template = CHAT.replace("| trim", "| upper")
    with pytest.raises(UserError, match="does not write a message as it is"):
        as_chat(template, tokenizer)
