"""Folders that the system itself lets nobody write to: without the right to, and on a filesystem that is read-only."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import small_runs
from rankwise.cli import main
from rankwise.recipes import dump_recipe
from rankwise.run import Run
from rankwise.schema import Recipe
from test_stopping import SHORT, send_at

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="root's rights and mounts are taken away as on Linux")
MOUNT = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
ENDED = "and it ended, with status "
SCRIPT = f"""
import json, sys
from pathlib import Path
import small_runs
from rankwise.cli import main
folder = Path(sys.argv[1])
for words in json.loads(sys.argv[2]):
    before = small_runs.hashes(folder)
    status = main(words)
    assert small_runs.hashes(folder) == before, words
    print({ENDED!r} + str(status), file=sys.stderr)
"""
SAID = {"permission": "Permission denied", "filesystem": "Read-only file system"}


def without_rights(folder: Path) -> list[str]:
    """How to start a command for which this folder is one that it may not write to."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    if (words and shutil.which("setpriv") is None) or succeeds([*words, "test", "-w", str(folder)]):
        pytest.skip("root may write anywhere, and that right cannot be taken away here")
    return words


def read_only(folder: Path) -> list[str]:
    """How to start a command for which this folder is on a filesystem that is read-only."""
    words = ["unshare", "--mount", "sh", "-c", MOUNT, str(folder)]
    if shutil.which("unshare") is None or not succeeds([*words, "true"]):
        pytest.skip("no filesystem may be mounted here")
    return words


def succeeds(words: list[str]) -> bool:
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


@pytest.fixture(params=SAID)
def how(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    yield request.param
    for path in [tmp_path, *tmp_path.rglob("*")]:
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


def assert_refused(how: str, folder: Path, *commands: list[str]) -> None:
    """Commands for which a folder is read-only say so in one line each, and leave what is there."""
    before = small_runs.hashes(folder)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    prefix = without_rights(folder) if how == "permission" else read_only(folder)
    started = [*prefix, sys.executable, "-c", SCRIPT, str(folder), json.dumps(commands)]
    ended = subprocess.run(started, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    statuses = re.findall(rf"{ENDED}(\d+)", ended.stderr)
    assert len(statuses) == len(commands) and set(statuses) <= {"1", "2"}, ended.stderr
    for one in ended.stderr.split(ENDED)[:-1]:
        told = [line for line in one.splitlines() if line.startswith("rankwise: ")]
        assert len(told) == 1 and SAID[how] in told[0] and "Traceback" not in one, one
    assert small_runs.hashes(folder) == before


def test_a_run_that_may_no_longer_be_written_goes_on_when_it_may(
    how: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small_runs.recipe("instructions", tmp_path, model_folder, stages=[SHORT], output=str(tmp_path / "whole"))
    expected = Run(whole, small_runs.silent())()
    recipe = whole.model_copy(update={"output": str(tmp_path / "run")})
    with monkeypatch.context() as patch, pytest.raises(BaseException, match="stopped by SIGTERM"):
        send_at(4, patch, signal.SIGTERM)
        Run(recipe, small_runs.silent())()
    assert_refused(how, tmp_path / "run", ["train", written(tmp_path, recipe)])
    for path in (tmp_path / "run", *(tmp_path / "run").rglob("*")):
        path.chmod(path.stat().st_mode | stat.S_IWUSR)
    assert Run(recipe, small_runs.silent())()["rows"] == expected["rows"]


def written(folder: Path, recipe: Recipe) -> str:
    path = folder / "recipe.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    return str(path)


def test_nothing_is_begun_where_nothing_may_be_written(how: str, model_folder: Path, tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.mkdir()
    recipe = small_runs.recipe("instructions", tmp_path, model_folder, stages=[SHORT], output=str(held / "run"))
    shop = small_runs.recipe("interactions", tmp_path / "shop", model_folder)
    cached = ["--out", str(tmp_path / "start"), "--rank", "2", "--cache", str(held / "cache")]
    assert_refused(
        how,
        held,
        ["train", written(tmp_path, recipe)],
        ["init", str(model_folder), "--out", str(held / "start"), "--rank", "2"],
        ["init", str(model_folder), *cached],
        ["prepare", written(tmp_path / "shop", shop), str(held / "rows")],
    )
    assert not (tmp_path / "start").exists()


def test_an_export_is_not_begun_where_nothing_may_be_written(how: str, model_folder: Path, tmp_path: Path) -> None:
    recipe = small_runs.recipe("instructions", tmp_path, model_folder, stages=[SHORT])
    Run(recipe, small_runs.silent())()
    held = tmp_path / "held"
    assert main(["export", recipe.output, str(held / "adapter")]) == 0
    assert_refused(how, held, ["export", recipe.output, str(held / "adapter"), "--rank", "2"])
