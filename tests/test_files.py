from __future__ import annotations

import json
import math
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.errors import UserError
from rankwise.files import (
    MANIFEST,
    check_folder,
    check_output,
    check_writable,
    clear_unfinished,
    in_use,
    new_folder,
    remove_folder,
    write_json,
    write_jsonl,
    write_text,
)


class Crash(RuntimeError):
    pass


def crash(*_: object, **__: object) -> None:
    raise Crash("the disk is full")


def tree(folder: Path) -> dict[str, str]:
    """Every file and folder below, hidden ones too, with what is in it; manifests have tests of their own."""
    found = (path for path in folder.rglob("*") if path.name != MANIFEST)
    return {str(path.relative_to(folder)): path.read_text() if path.is_file() else "/" for path in found}


def test_text_is_written_in_folders_that_are_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "text.txt", "Müller\n日本\n")
    assert (tmp_path / "a/b/text.txt").read_bytes() == "Müller\n日本\n".encode()
    assert tree(tmp_path).keys() == {"a", "a/b", "a/b/text.txt"}


def test_text_replaces_what_was_there(tmp_path):
    path = tmp_path / "text.txt"
    write_text(path, "a long old text")
    write_text(path, "new")
    assert tree(tmp_path) == {"text.txt": "new"}


@pytest.mark.parametrize("broken", ["os.fsync", "pathlib.Path.replace"])
def test_a_failure_leaves_the_old_text_and_nothing_else(tmp_path, monkeypatch, broken):
    write_text(tmp_path / "text.txt", "old")
    monkeypatch.setattr(broken, crash)
    with pytest.raises(Crash):
        write_text(tmp_path / "text.txt", "new")
    with pytest.raises(Crash):
        write_text(tmp_path / "other.txt", "new")
    assert tree(tmp_path) == {"text.txt": "old"}


def test_text_that_cannot_be_encoded_leaves_the_old_one(tmp_path):
    write_text(tmp_path / "text.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "text.txt", "half a \ud800 pair")
    assert tree(tmp_path) == {"text.txt": "old"}


def test_json_round_trip_and_a_value_that_is_none(tmp_path):
    value = {"title": "Amélie", "ranks": [1, 2], "none": None}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value and "Amélie" in text and text.endswith("}\n")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"set": {1}})
    assert tree(tmp_path) == {"a.json": text}


def test_jsonl_counts_its_rows_and_fails_as_a_whole(tmp_path):
    rows = [{"a": 1}, {"b": "zwei\nZeilen"}]
    write_jsonl(tmp_path / "rows.jsonl", iter(rows))
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows

    def failing():
        yield {"a": 2}
        crash()

    with pytest.raises(Crash):
        write_jsonl(tmp_path / "rows.jsonl", failing())
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2
    write_jsonl(tmp_path / "empty.jsonl", [])
    assert (tmp_path / "empty.jsonl").read_text() == ""


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(tmp_path, mask):
    old = os.umask(mask)
    try:
        write_text(tmp_path / "text.txt", "x")
        with new_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "text.txt").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask


def fill(path: Path, **files: str) -> None:
    with new_folder(path) as made:
        for name, text in files.items():
            (made / name).write_text(text)


def test_a_new_folder_is_made_and_replaced_as_a_whole(tmp_path):
    path = tmp_path / "runs" / "folder"
    fill(path, one="1", two="2")
    assert tree(tmp_path) == {"runs": "/", "runs/folder": "/", "runs/folder/one": "1", "runs/folder/two": "2"}
    fill(path, two="zwei")
    assert tree(tmp_path / "runs") == {"folder": "/", "folder/two": "zwei"}


@pytest.mark.parametrize("name", ["n" * 255, "ä" * 127])
def test_names_as_long_as_a_system_takes(tmp_path, name):
    for text in ("old", "new"):
        write_text(tmp_path / name, text)
        with new_folder(tmp_path / "folders" / name) as made:
            write_text(made / "text", text)
    assert (tmp_path / name).read_text() == (tmp_path / "folders" / name / "text").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2 and len(list((tmp_path / "folders").iterdir())) == 1


def test_a_folder_is_not_there_before_its_block_ends(tmp_path):
    with new_folder(tmp_path / "folder") as made:
        assert made.is_dir() and made.parent == tmp_path
        assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder").is_dir()


@pytest.mark.parametrize("error", [Crash, KeyboardInterrupt])
def test_a_failing_block_leaves_the_old_folder_and_nothing_else(tmp_path, error):
    fill(tmp_path / "folder", one="1")
    for name in ("folder", "other"):
        with pytest.raises(error), new_folder(tmp_path / name) as made:
            (made / "two").write_text("2")
            raise error
    assert tree(tmp_path) == {"folder": "/", "folder/one": "1"}


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_exchange_leaves_the_old_folder_and_nothing_else(tmp_path, monkeypatch, failing):
    """Moving the old folder aside fails, or putting the new one in its place does."""
    fill(tmp_path / "folder", one="1")
    rename, calls = Path.rename, []

    def sometimes(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == failing:
            crash()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", sometimes)
    with pytest.raises(Crash):
        fill(tmp_path / "folder", two="2")
    assert len(calls) >= failing
    assert tree(tmp_path) == {"folder": "/", "folder/one": "1"}


def test_a_file_in_the_place_of_a_folder_is_not_destroyed(tmp_path):
    (tmp_path / "folder").write_text("precious")
    with pytest.raises(FileExistsError, match="is a file"):
        fill(tmp_path / "folder", one="1")
    assert tree(tmp_path) == {"folder": "precious"}


KILLED = """
import os, signal, sys
from pathlib import Path
from rankwise.files import new_folder
with new_folder(Path(sys.argv[1])) as made:
    (made / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(path: Path) -> None:
    """A process that dies while it fills the folder."""
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    killed(tmp_path / "folder")
    killed(tmp_path / "folder2")
    assert [path.read_text() for path in tmp_path.rglob("half")] == ["half", "half"]
    fill(tmp_path / "folder", one="1")
    assert len(list(tmp_path.glob(".folder.*"))) == 0
    assert len(list(tmp_path.glob(".folder2.*"))) == 1  # of another folder


def test_a_folder_that_another_fills_is_not_removed(tmp_path):
    with new_folder(tmp_path / "folder") as slow:
        (slow / "one").write_text("1")
        fill(tmp_path / "folder", two="2")
        assert (slow / "one").read_text() == "1"
    assert tree(tmp_path) == {"folder": "/", "folder/one": "1"}


def moved_aside(path: Path, digit: str = "0") -> None:
    """A folder as an exchange that was cut off leaves it."""
    aside = path.with_name(f".{path.name}.{digit * 32}.old")
    aside.mkdir()
    (aside / "old").write_text("old")


def test_the_only_old_folder_is_put_back_where_an_exchange_was_cut_off(tmp_path):
    killed(tmp_path / "folder")
    moved_aside(tmp_path / "folder")
    with pytest.raises(Crash), new_folder(tmp_path / "folder"):
        crash()
    assert tree(tmp_path) == {"folder": "/", "folder/old": "old"}
    fill(tmp_path / "folder", one="1")
    assert tree(tmp_path) == {"folder": "/", "folder/one": "1"}


def test_an_old_folder_beside_the_new_one_is_removed_and_of_several_none_is_chosen(tmp_path):
    moved_aside(tmp_path / "folder")
    fill(tmp_path / "folder", one="1")  # puts it back, and replaces it
    assert tree(tmp_path) == {"folder": "/", "folder/one": "1"}
    for digit in "12":
        moved_aside(tmp_path / "other", digit)
    with pytest.raises(Crash), new_folder(tmp_path / "other"):
        crash()
    assert len(list(tmp_path.glob(".other.*.old"))) == 2


def test_one_byte_that_changes_anywhere_is_found(tmp_path):
    folder = tmp_path / "folder"
    with new_folder(folder) as made:
        (made / "below").mkdir()
        (made / "below" / "weights").write_bytes(bytes(range(64)))
        (made / "empty").touch()
    check_folder(folder, whole=True)
    for file in (path for path in folder.rglob("*") if path.is_file()):
        good = file.read_bytes()
        for place in range(len(good)):
            file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            with pytest.raises(UserError, match=r"damaged|missing|not as it was written"):
                check_folder(folder)
        file.write_bytes(good[: len(good) // 2] if good else b"x")
        with pytest.raises(UserError):
            check_folder(folder)
        file.write_bytes(good)
    check_folder(folder, whole=True)


def test_a_missing_file_is_found_and_a_folder_of_others_is_taken_as_it_is(tmp_path):
    fill(tmp_path / "folder", one="1", two="2")
    (tmp_path / "folder" / "three").write_text("3")
    check_folder(tmp_path / "folder")
    (tmp_path / "folder" / "two").unlink()
    with pytest.raises(UserError, match="two is missing"):
        check_folder(tmp_path / "folder")
    (tmp_path / "folder" / MANIFEST).unlink()
    check_folder(tmp_path / "folder")
    with pytest.raises(UserError, match=r"has no manifest\.json: it was not written to its end"):
        check_folder(tmp_path / "folder", whole=True)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "below/../../outside"])
def test_a_manifest_names_nothing_outside_of_its_folder(tmp_path, name):
    fill(tmp_path / "folder", one="1")
    (tmp_path / "outside").write_text("1")
    path = tmp_path / "folder" / MANIFEST
    path.write_text(path.read_text().replace("one", name))
    with pytest.raises(UserError, match="damaged"):
        check_folder(tmp_path / "folder")


def test_a_folder_is_gone_before_its_files_are(tmp_path, monkeypatch):
    fill(tmp_path / "run" / "folder", one="1")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", crash)
        with pytest.raises(Crash):
            remove_folder(tmp_path / "run" / "folder")
    assert not (tmp_path / "run" / "folder").exists() and len(tree(tmp_path / "run")) == 2
    with in_use(tmp_path / "run"):
        assert tree(tmp_path / "run") == {}
    remove_folder(tmp_path / "run" / "folder")


def test_files_that_another_writes_are_not_cleared(tmp_path):
    def pieces():
        yield {"a": 1}
        clear_unfinished(tmp_path)
        yield {"b": 2}

    (tmp_path / f".rows.jsonl.{'a' * 32}").write_text("half")
    write_jsonl(tmp_path / "rows.jsonl", pieces())
    assert [*tree(tmp_path)] == ["rows.jsonl"] and tree(tmp_path)["rows.jsonl"].count("\n") == 2


def test_one_process_writes_in_a_folder_at_a_time(tmp_path):
    with in_use(tmp_path / "run"):
        with pytest.raises(UserError, match="is being written by another process"), in_use(tmp_path / "run"):
            pass
        (tmp_path / "run" / "result").write_text("1")
    (tmp_path / "run" / f".result.{'a' * 32}").write_text("half")
    with in_use(tmp_path / "run"):
        assert tree(tmp_path / "run") == {"result": "1"}


def test_numbers_that_json_has_not_are_null(tmp_path):
    value = {"a": math.nan, "b": [1.5, (-math.inf, "x")], "c": {"d": {1: math.inf}}, "e": [True, None, 3]}
    plain = {"a": None, "b": [1.5, [None, "x"]], "c": {"d": {"1": None}}, "e": [True, None, 3]}
    write_json(tmp_path / "one.json", value)
    write_jsonl(tmp_path / "lines.jsonl", [value, {"f": 2.5}])
    assert json.loads((tmp_path / "one.json").read_text()) == plain
    assert [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()] == [plain, {"f": 2.5}]


def test_a_folder_can_be_tried_before_slow_work(tmp_path):
    check_writable(tmp_path / "new" / "one")
    assert tree(tmp_path) == {"new": "/", "new/one": "/"}
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError):
            check_writable(folder)


def test_where_something_is_to_be_written_is_tried_before_slow_work(tmp_path):
    check_output(tmp_path / "new" / "one")
    assert tree(tmp_path) == {"new": "/"}
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file/below cannot be written \(.*\): give another place"):
        check_output(tmp_path / "file" / "below")
