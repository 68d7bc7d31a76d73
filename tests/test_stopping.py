"""Runs that are asked to end, by SIGTERM or Ctrl-C; errors of the system; one process at a time."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from transformers import TrainerControl, TrainerState, TrainingArguments

import rankwise.commands
import rankwise.run
import rankwise.training
import small_runs
from rankwise.checkpoints import stopping
from rankwise.checkpoints.resuming import checkpoints_of
from rankwise.checkpoints.stopping import SaveInTime, StopRequest, stopped_by_sigterm
from rankwise.cli import main
from rankwise.errors import Stopped, UserError
from rankwise.files import in_use
from rankwise.measuring import measured
from rankwise.recipes import dump_recipe
from rankwise.run import Run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
SHORT = small_runs.SFT | {"batch_size": 4}


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Ctrl-C does what it does in a terminal, also where a shell that runs the tests aside has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send_at(step: int, monkeypatch: pytest.MonkeyPatch, *signals: signal.Signals, wait: float = 0.0) -> None:
    """The process gets these signals when so many steps are taken."""

    class Sending(SaveInTime):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == step:
                for number in signals:
                    os.kill(os.getpid(), number)
                time.sleep(wait)
            super().on_step_end(args, state, control, **more)

    monkeypatch.setattr(rankwise.training, "SaveInTime", Sending)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("every", [None, 600.0])
def test_a_training_that_is_asked_to_end_saves_a_checkpoint_first(
    number: signal.Signals, every: float | None, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small_runs.recipe("instructions", tmp_path / "whole", model_folder, stages=[SHORT])
    expected = Run(whole, small_runs.silent())()
    recipe = whole.model_copy(update={"output": str(tmp_path / "run"), "checkpoint_seconds": every})
    handlers = [signal.getsignal(known) for known in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)]
    with monkeypatch.context() as patch:
        send_at(4, patch, number)
        words = rf"stopped by {number.name} at stage sft, step 4 of \d+, which is saved: the same command goes on"
        with pytest.raises(Stopped, match=words):
            Run(recipe, small_runs.silent())()
    assert [signal.getsignal(known) for known in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)] == handlers
    assert [path.name for path in checkpoints_of(Path(recipe.output), "sft").iterdir()] == ["checkpoint-4"]
    assert Run(recipe, small_runs.silent())()["rows"] == expected["rows"]
    assert small_runs.hashes(Path(recipe.output) / "cases") == small_runs.hashes(Path(whole.output) / "cases")


@pytest.mark.parametrize(
    "adapter",
    [
        {"kind": "milora", "r": 2},
        {"kind": "sora", "r": 4, "threshold": 0.02, "gate_lr": 0.05, "shrink_after": 2},
        {"kind": "full"},
    ],
)
def test_a_stage_that_was_trained_and_not_measured_is_not_trained_again(
    adapter: dict[str, Any], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = [SHORT, SHORT | {"name": "more"}]
    whole = small_runs.recipe("instructions", tmp_path / "whole", model_folder, stages=stages, adapter=adapter)
    expected = Run(whole, small_runs.silent())()
    recipe = whole.model_copy(update={"output": str(tmp_path / "run"), "checkpoint_seconds": None})

    def asked_to_end(task: Any, model: Any, name: str, *more: Any, **settings: Any) -> dict[str, Any]:
        if name in ending:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return measured(task, model, name, *more, **settings)

    def trained(*given: Any, **settings: Any) -> dict[str, int]:
        names.append(given[2].name)
        return rankwise.training.train_stage(*given, **settings)

    names, ending = list[str](), list[str]()
    monkeypatch.setattr(rankwise.run, "train_stage", trained)
    monkeypatch.setattr(rankwise.run, "measured", asked_to_end)
    for name in ("sft", "more"):
        ending[:] = [name]
        with pytest.raises(Stopped, match="stopped by SIGTERM: the same command goes on with what is not finished"):
            Run(recipe, small_runs.silent())()
    ending.clear()
    found = Run(recipe, small_runs.silent())()
    assert names == ["sft", "more"] and found["rows"] == expected["rows"] and found["counts"] == expected["counts"]
    assert found.keys() == expected.keys()
    for part in ("stages/sft", "stages/more", "adapter"):
        one, two = (small_runs.hashes(Path(folder.output) / part) for folder in (whole, recipe))
        assert {name: value for name, value in one.items() if name.endswith(".safetensors")} == {
            name: value for name, value in two.items() if name.endswith(".safetensors")
        }


@pytest.mark.parametrize("again", [True, False])
def test_a_second_signal_or_a_step_that_takes_too_long_ends_it_at_once(
    again: bool, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_runs.recipe("instructions", tmp_path, model_folder, stages=[SHORT])
    monkeypatch.setattr(stopping, "GRACE", 0.05)
    monkeypatch.setattr(stopping, "TOGETHER", 0.0)
    signals = [signal.SIGTERM] * (2 if again else 1)
    send_at(2, monkeypatch, *signals, wait=0.0 if again else 5.0)
    with pytest.raises(Stopped, match="stopped by SIGTERM within a step: the same command goes on from the last"):
        Run(recipe, small_runs.silent())()


def test_a_signal_that_comes_again_at_once_is_the_same(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a terminal sends one to all processes of a command, and the command another to those that it started."""
    recipe = small_runs.recipe("instructions", tmp_path, model_folder, stages=[SHORT])
    send_at(2, monkeypatch, signal.SIGINT, signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped by SIGINT at stage sft, step 2 of"):
        Run(recipe, small_runs.silent())()


def test_the_command_says_it_in_one_line(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small_runs.recipe("instructions", tmp_path, model_folder, stages=[SHORT])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    with monkeypatch.context() as patch:
        send_at(2, patch, signal.SIGTERM)
        assert main(["train", str(tmp_path / "recipe.yaml")]) == 1
    assert capsys.readouterr().err.startswith("rankwise: stopped by SIGTERM at stage sft, step 2")
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 2
    assert "holds this run, finished" in capsys.readouterr().err


def test_elsewhere_than_in_the_main_thread_signals_stay_as_they_are() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def watch() -> None:
        with StopRequest().watched(), stopped_by_sigterm():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert seen == [before]


def test_what_waits_for_others_is_ended_by_sigterm() -> None:
    with pytest.raises(Stopped, match="goes on with what is not finished"), stopped_by_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest().watched() as _:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_two_processes_do_not_write_in_one_run(model_folder: Path, tmp_path: Path) -> None:
    recipe = small_runs.recipe("instructions", tmp_path, model_folder, stages=[SHORT])
    with in_use(Path(recipe.output)), pytest.raises(UserError, match="is being written by another process"):
        Run(recipe, small_runs.silent())()
    assert list(Path(recipe.output).iterdir()) == []


def test_a_damaged_checkpoint_is_removed_and_said(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_runs.recipe("instructions", tmp_path, model_folder, stages=[SHORT])
    with monkeypatch.context() as patch:
        send_at(4, patch, signal.SIGTERM)
        with pytest.raises(Stopped):
            Run(recipe, small_runs.silent())()
    state = checkpoints_of(Path(recipe.output), "sft") / "checkpoint-4" / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    console = small_runs.silent()
    assert Run(recipe, console)()["rows"]
    said = "".join(small_runs.printed(console).split())  # a long path breaks the line anywhere
    assert "state.safetensorsisnotasitwaswritten" in said
    assert "sft: 1/" in small_runs.printed(console) or "sft: 2/" in small_runs.printed(console)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "a/b"),
            "a/b: No space left on device: free some space there",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "a/b: Permission denied: give another place"),
        (OSError(errno.EROFS, "Read-only file system", "a"), "a: Read-only file system: give another place, or"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "(os error 28): free some space there"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def methods(*_: Any) -> None:
        raise error

    monkeypatch.setattr(rankwise.commands, "methods", methods)
    assert main(["methods"]) == 1
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and "what was there before is as it was" in err


def test_any_other_error_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def methods(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error", "a")

    monkeypatch.setattr(rankwise.commands, "methods", methods)
    assert main(["methods"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_checkpoints_take_a_twentieth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    arguments = TrainingArguments(output_dir="-", use_cpu=True)
    state, control = TrainerState(max_steps=10_000), TrainerControl()
    saving = SaveInTime(10.0, StopRequest())
    saved = []
    for step in range(1, 600):
        now, state.global_step, control.should_save = now + 1, step, False
        saving.on_step_end(arguments, state, control)
        if control.should_save:
            saved.append(step)
            now += 4  # what writing one takes
            saving.on_save(arguments, state, control)
    assert saved[:3] == [10, 90, 170] and 4 * len(saved) < 0.06 * now
    now += saving.every
    saving.on_step_end(arguments, state, control)
    saving.on_save(arguments, state, control)  # in no time: the disk was slow for a while
    assert saving.every == 10


def test_a_signal_after_another_process_s_is_the_same_request() -> None:
    """It comes while the checkpoint is written that both asked for."""
    stop = StopRequest()
    stop.join("a signal to another process")
    stop._ask(signal.SIGTERM, None)
    with pytest.raises(Stopped, match="stopped by a signal to another process at here, which is saved"):
        stop.check("here", saved=True)
