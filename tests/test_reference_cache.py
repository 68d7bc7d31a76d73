"""A cache of log-probabilities gives what was put in, or says what is wrong with its file."""

from __future__ import annotations

import errno
import json
import logging
import math
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rankwise.errors import UserError
from rankwise.preferences import reference_cache
from rankwise.preferences.reference_cache import ReferenceCache, pair_keys
from rankwise.preferences.rows import PreferenceRow
from rankwise.tokenise import encode_answer_set

NAME = "0123456789abcdef0123456789abcdef"
PROMPT, ANSWERS, VALUES = [5, 6, 7], [[8, 2], [9, 2], [8, 9, 2]], [-1.25, -3.5, math.pi]

ids = st.lists(st.integers(0, 2) | st.integers(0, 2**40), max_size=2)
finite = st.floats(allow_nan=False, allow_infinity=False)


def filled(folder: Path, name: str = NAME, about: str = "a tiny model") -> ReferenceCache:
    cache = ReferenceCache(folder, name, about)
    cache.add(PROMPT, ANSWERS, VALUES)
    cache.save()
    return cache


def test_what_was_added_comes_back(tmp_path: Path) -> None:
    """In another order and number of answers, before and after saving, to the bit."""
    cache = filled(tmp_path / "new" / "folder")
    for one in (cache, ReferenceCache(cache.folder, NAME)):
        assert len(one) == 3
        assert one.get(PROMPT, ANSWERS) == VALUES
        assert one.get(PROMPT, [ANSWERS[2], ANSWERS[0]]) == [math.pi, -1.25]
        assert one.get(PROMPT, [ANSWERS[0], ANSWERS[0]]) == [-1.25, -1.25]
        assert one.get(PROMPT, []) == []
        assert one.about == "a tiny model"
    assert [path.name for path in cache.folder.iterdir()] == [f"{NAME}.safetensors"]


def test_a_row_that_is_not_known_whole_is_not_known(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    assert cache.get(PROMPT, [*ANSWERS, [1]]) is None
    assert cache.get([5, 6], ANSWERS) is None
    assert cache.get([], [[*PROMPT, *ANSWERS[0]]]) is None
    assert ReferenceCache(tmp_path, "f" * 32).get(PROMPT, ANSWERS) is None


def test_where_a_prompt_ends_is_part_of_a_key() -> None:
    """All ways to cut one sequence in two, one of its ids the length that another prompt would have."""
    whole = [3, 1, 2, 0, 1]
    keys = {key for cut in range(6) for key in pair_keys(whole[:cut], [whole[cut:]])}
    assert len(keys) == 6 and {len(key) for key in keys} == {16}


def test_another_tokenizer_or_template_gives_other_keys(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """The same words: with another vocabulary, with another begin token, and with words of a template around them."""

    def keys(tokenizer: PreTrainedTokenizerFast, template: str = "{}") -> set[bytes]:
        found = encode_answer_set(tokenizer, template.format("The quick brown fox"), ["jumps", "over a river"], 64)
        assert found is not None
        return set(pair_keys(found[0], found[1]))

    other = PreTrainedTokenizerFast(tokenizer_object=_reversed(tiny_tokenizer), eos_token="<|endoftext|>")
    begun = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token="<|pad|>", eos_token="<|endoftext|>"
    )
    found = [keys(tiny_tokenizer), keys(other), keys(begun), keys(tiny_tokenizer, "Q: {}\nA:")]
    assert len(set().union(*found)) == 8
    assert keys(tiny_tokenizer) == found[0]


def _reversed(tokenizer: PreTrainedTokenizerFast) -> Any:
    """The same tokens by other ids."""
    text = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = text["model"]["vocab"]
    text["model"]["vocab"] = {token: len(vocabulary) - 1 - number for token, number in vocabulary.items()}
    for added in text["added_tokens"]:
        added["id"] = text["model"]["vocab"][added["content"]]
    return type(tokenizer.backend_tokenizer).from_str(json.dumps(text))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(ids, st.lists(st.tuples(ids, finite), max_size=4), st.integers(0, 3)), max_size=12),
    asked=st.lists(st.tuples(ids, st.lists(ids, max_size=3)), max_size=6),
    pending=st.integers(1, 5),
)
def test_it_is_a_dictionary_that_is_kept_on_disk(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[tuple[list[int], list[tuple[list[int], float]], int]],
    asked: list[tuple[list[int], list[list[int]]]],
    pending: int,
) -> None:
    """Against a dict, with a save (1) or a save and a new reading (2) after some rows."""
    monkeypatch.setattr(reference_cache, "PENDING", pending)
    folder = tmp_path_factory.mktemp("cache")
    cache, expected = ReferenceCache(folder, NAME), {}
    for prompt, pairs, then in rows:
        cache.add(prompt, [answer for answer, _ in pairs], [value for _, value in pairs])
        expected |= {(tuple(prompt), tuple(answer)): value for answer, value in pairs}
        if then:
            cache.save()
        if then == 2:
            cache = ReferenceCache(folder, NAME)
        for one, answers in [*asked, *((row, [answer for answer, _ in pairs]) for row, pairs, _ in rows)]:
            known = [expected.get((tuple(one), tuple(answer))) for answer in answers]
            assert cache.get(one, answers) == (None if None in known else known)
        assert len(cache) == len(expected)


@pytest.mark.parametrize("end", [0, 1, 255])
def test_keys_that_end_in_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: int) -> None:
    """numpy takes zeros at the end of bytes for filling."""
    made = {(1,): bytes(16), (2,): bytes(15) + b"\1", (3,): b"\1" + bytes(15), (4,): bytes([end]) * 15 + b"\0"}
    monkeypatch.setattr(
        reference_cache, "pair_keys", lambda prompt, answers: [made[tuple(answer)] for answer in answers]
    )
    cache = ReferenceCache(tmp_path, NAME)
    cache.add([], [[4], [2], [1]], [4.0, 2.0, 1.0])
    cache.save()
    cache = ReferenceCache(tmp_path, NAME)
    assert cache.get([], [[1], [2]]) == [1.0, 2.0]
    assert cache.get([], [[3]]) is None
    cache.add([], [[3]], [3.0])
    assert cache.get([], [[3], [2]]) == [3.0, 2.0]


def test_what_others_wrote_meanwhile_is_kept(tmp_path: Path) -> None:
    """Of a pair that both have, the value of the one that saves last."""
    first, second = ReferenceCache(tmp_path, NAME), ReferenceCache(tmp_path, NAME)
    first.add([1], [[2], [3]], [-2.0, -3.0])
    second.add([1], [[3], [4]], [-3.5, -4.0])
    first.save()
    second.save()
    assert second.get([1], [[2], [3], [4]]) == [-2.0, -3.5, -4.0]
    assert ReferenceCache(tmp_path, NAME).get([1], [[2], [3], [4]]) == [-2.0, -3.5, -4.0]


def save_rows(folder: Path, process: int, start: Any) -> None:
    start.wait()
    for number in range(8):
        cache = ReferenceCache(folder, NAME)
        cache.add([process], [[number], [number, 0]], [-float(number), process + 0.5])
        cache.save()


def test_two_processes_save_into_one_file(tmp_path: Path) -> None:
    """Neither loses a pair, though both read and write the file again and again."""
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    processes = [context.Process(target=save_rows, args=(tmp_path, number, start)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    cache = ReferenceCache(tmp_path, NAME)
    assert len(cache) == 32
    for process_number in range(2):
        found = [cache.get([process_number], [[number], [number, 0]]) for number in range(8)]
        assert found == [[-float(number), process_number + 0.5] for number in range(8)]
    assert [path.name for path in tmp_path.iterdir()] == [f"{NAME}.safetensors"]


def test_nothing_new_is_not_written(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    before = cache.path.stat()
    cache.save()
    cache.get(PROMPT, ANSWERS)
    cache.save()
    assert (cache.path.stat().st_ino, cache.path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_models_have_files_of_their_own(tmp_path: Path) -> None:
    filled(tmp_path)
    other = ReferenceCache(tmp_path, "f" * 32)
    other.add(PROMPT, ANSWERS, [1.0, 2.0, 3.0])
    other.save()
    assert ReferenceCache(tmp_path, NAME).get(PROMPT, ANSWERS) == VALUES
    assert ReferenceCache(tmp_path, "f" * 32).get(PROMPT, ANSWERS) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_any_changed_byte_is_found(tmp_path: Path, flip: int) -> None:
    """Each byte of the file in turn: of its head, its names, its values."""
    path = filled(tmp_path).path
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
        with pytest.raises(UserError, match=re.escape(f"{path} ") + ".*: delete it, or give another folder$"):
            ReferenceCache(tmp_path, NAME)
    assert len(whole) > 300
    path.write_bytes(whole)
    assert ReferenceCache(tmp_path, NAME).get(PROMPT, ANSWERS) == VALUES


def test_a_file_that_is_cut_off_anywhere_is_found(tmp_path: Path) -> None:
    path = filled(tmp_path).path
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cannot be read, or is cut off or damaged \(.*\): delete it"):
            ReferenceCache(tmp_path, NAME)
    path.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="cut off or damaged"):
        ReferenceCache(tmp_path, NAME)


def packed(keys: Any, values: Any, **metadata: str) -> bytes:
    return safetensors.numpy.save({"keys": keys, "values": values}, metadata=metadata)


def good(values: list[float], name: str = NAME) -> bytes:
    pairs = reference_cache._pairs({bytes([number + 1]) * 16: value for number, value in enumerate(values)})
    return reference_cache._packed(pairs, name, "the model of another run")


FOREIGN: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "cut off or damaged"),
    "text": (lambda: b"not a tensor in it, but more than eight bytes", "cut off or damaged"),
    "tensors": (lambda: safetensors.numpy.save({"a": np.zeros(3)}), "is no file of log-probabilities of a reference"),
    "other version": (
        lambda: good([1.0]).replace(b"log-probabilities 1", b"log-probabilities 2"),
        "or one of another version of rankwise",
    ),
    "no digest": (
        lambda: packed(np.zeros((1, 16), np.uint8), np.zeros(1), format=reference_cache.FORMAT),
        "is damaged: its content is not what its digest says",
    ),
    "other dtype": (
        lambda: packed(np.zeros((1, 16), np.uint8), np.zeros(1, np.float32), format=reference_cache.FORMAT),
        "is damaged",
    ),
    "other shape": (
        lambda: packed(np.zeros((2, 16), np.uint8), np.zeros(1), format=reference_cache.FORMAT),
        "is damaged",
    ),
    "another model": (
        lambda: good([1.0], "f" * 32),
        f"holds log-probabilities of another model ({'f' * 32}; the model of another run)",
    ),
    "nan": (lambda: good([1.0, math.nan, -math.inf]), "2 of 3 log-probabilities are not finite"),
}


@pytest.mark.parametrize("kind", list(FOREIGN))
def test_a_file_of_something_else_is_named(tmp_path: Path, kind: str) -> None:
    make, message = FOREIGN[kind]
    path = tmp_path / f"{NAME}.safetensors"
    content = make()
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=rf"^{re.escape(str(path))}.*{re.escape(message)}.*: delete it, or give another"
    ):
        ReferenceCache(tmp_path, NAME)
    assert path.read_bytes() == content


def test_a_file_that_is_damaged_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, NAME)
    cache.add(PROMPT, ANSWERS, VALUES)
    cache.path.write_bytes(b"something")
    with pytest.raises(UserError, match="cut off or damaged"):
        cache.save()
    assert cache.path.read_bytes() == b"something"


def test_a_folder_in_the_place_of_the_file_or_a_file_in_that_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.safetensors").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        ReferenceCache(tmp_path, NAME)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"folder .*file of the reference's log-probabilities cannot be written to"):
        ReferenceCache(tmp_path / "file", NAME)


def test_a_full_disk_costs_the_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ReferenceCache(tmp_path, NAME)
    cache.add(PROMPT, ANSWERS, VALUES)

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(reference_cache, "write_bytes", full)
        cache.save()
    assert f"{cache.path} cannot be written" in caplog.text and "No space left" in caplog.text
    assert cache.get(PROMPT, ANSWERS) == VALUES
    cache.save()
    assert ReferenceCache(tmp_path, NAME).get(PROMPT, ANSWERS) == VALUES


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    cache = ReferenceCache(tmp_path, NAME)
    message = (
        f"the reference gives {value} as the log-probability of an answer of 3 tokens after a prompt of 2: look at"
    )
    with pytest.raises(UserError, match=message):
        cache.add([1, 2], [[3, 4, 5]], [value])
    assert len(cache) == 0


def test_a_value_is_needed_for_each_answer(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, NAME)
    with pytest.raises(ValueError, match="shorter"):
        cache.add(PROMPT, ANSWERS, VALUES[:2])


ROWS = [PreferenceRow([number], [[number, 1], [2, 3, 4, 5], [6]]) for number in range(20)]
LIMITS = {torch.float64: 0.01, torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.25}


def scored(rows: list[PreferenceRow], change: float = 0.0) -> list[list[float]]:
    """Of each answer of a row; the one of four tokens is changed."""
    return [[-1.0 - row.prompt[0], -2.0 + change, -3.0] for row in rows]


def cache_of(folder: Path, rows: list[PreferenceRow]) -> ReferenceCache:
    cache = ReferenceCache(folder, NAME, "model M, 320 tokens")
    for row, values in zip(rows, scored(rows), strict=True):
        cache.add(row.prompt, row.answers, values)
    cache.save()
    return ReferenceCache(folder, NAME)


def test_some_rows_that_are_known_are_computed_again(tmp_path: Path) -> None:
    """Only those that are known are drawn from, the same ones for a seed; others for another."""
    drawn: list[list[int]] = []

    def score(rows: list[PreferenceRow]) -> list[list[float]]:
        drawn.append([row.prompt[0] for row in rows])
        return scored(rows)

    assert ReferenceCache(tmp_path, NAME).verify(ROWS, score, torch.float32) == 0
    cache = cache_of(tmp_path, ROWS[:12])
    assert cache.verify(ROWS[12:], score, torch.float32) == 0
    assert cache.verify([], score, torch.float32) == 0
    assert drawn == []
    for seed in (0, 0, 1):
        assert cache.verify(ROWS, score, torch.float32, seed=seed) == 8
    assert cache.verify(ROWS[10:], score, torch.float32, count=5) == 2
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(set(one)) == len(one) and max(one) < 12 for one in drawn)
    assert sorted(drawn[3]) == [10, 11]


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_a_difference_beyond_rounding_is_an_error(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of four tokens twice what is allowed of one."""
    cache = cache_of(tmp_path, ROWS)
    limit = 2 * LIMITS[dtype]
    assert cache.verify(ROWS, lambda rows: scored(rows, 0.99 * limit), dtype) == 8
    message = re.escape(
        f"{cache.path} (model M, 320 tokens) does not hold what the reference gives: of 24 log-probabilities computed "
        f"again 8 differ by more than rounding in {dtype}, the largest by {1.01 * limit:.4g} nats: delete it, or give"
    )
    for sign in (1, -1):
        with pytest.raises(UserError, match=message):
            cache.verify(ROWS, lambda rows, sign=sign: scored(rows, sign * 1.01 * limit), dtype)


def test_a_reference_that_gives_nan_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"8 differ by more than rounding in torch.float32, the largest by nan nats"):
        cache_of(tmp_path, ROWS).verify(ROWS, lambda rows: scored(rows, math.nan), torch.float32)
