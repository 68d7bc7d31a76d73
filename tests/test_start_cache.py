from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rankwise as rw
import tiny
from rankwise.directions import cache as module
from rankwise.directions.cache import StartCache, default_folder, start_key
from rankwise.directions.triplets import triplets
from rankwise.errors import UserError

PARTS = ["minor", "principal", "middle", "random"]


def weight(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(12, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any decomposition from here on is an error."""

    def refuse(*_: object) -> None:
        raise AssertionError("decomposed, where the cache should have served")

    monkeypatch.setattr(module, "triplets", refuse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_serves_the_same_bits_without_decomposing(tmp_path, monkeypatch, part, dtype):
    given = weight(dtype=dtype)
    expected = triplets(given, 3, part, 5)
    first = StartCache(tmp_path / "starts").triplets(given, 3, part, 5)
    forbid(monkeypatch)
    again = StartCache(tmp_path / "starts")
    second = again.triplets(given.clone(), 3, part, 5)
    for one, two, three in zip(expected, first, second, strict=True):
        assert torch.equal(one, two) and torch.equal(two, three) and one.dtype == three.dtype
    assert (again.reused, again.broken) == (1, 0)


def test_the_key_is_what_the_start_depends_on():
    given = weight()
    key = start_key(given, 3, "minor")
    assert key == start_key(given.clone(), 3, "minor", 9)  # the seed is of the random draw alone
    assert key == start_key(given.T.contiguous().T, 3, "minor")  # the values count, not how they lie in memory
    changed = given.clone()
    changed[4, 5] += 1e-6
    others = [
        start_key(changed, 3, "minor"),
        start_key(given.T, 3, "minor"),
        start_key(given.reshape(8, 12), 3, "minor"),
        start_key(given.double(), 3, "minor"),
        start_key(given.view(torch.int32).view(torch.float32), 4, "minor"),
        start_key(given, 3, "principal"),
        start_key(given, 3, "random", 1),
        start_key(given, 3, "random", 2),
    ]
    assert len({key, *others}) == len(others) + 1


def halved(content: bytes) -> bytes:
    return content[: len(content) // 2]


def headless(content: bytes) -> bytes:
    return content[:5]


def flipped(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


def emptied(content: bytes) -> bytes:
    return b""


def foreign(content: bytes) -> bytes:
    from safetensors.torch import save

    return save({"U": torch.zeros(12, 3), "S": torch.zeros(3), "Vh": torch.zeros(3, 8)})


def nameless(content: bytes) -> bytes:
    from safetensors.torch import save

    return save({"other": torch.zeros(3)})


@pytest.mark.parametrize("damage", [halved, headless, flipped, emptied, foreign, nameless])
def test_a_damaged_file_is_computed_again_and_replaced(tmp_path, caplog, damage):
    expected = StartCache(tmp_path).triplets(weight(), 3, "minor")
    (path,) = tmp_path.iterdir()
    sound = path.read_bytes()
    path.write_bytes(damage(sound))
    cache = StartCache(tmp_path)
    found = cache.triplets(weight(), 3, "minor")
    assert all(torch.equal(one, two) for one, two in zip(expected, found, strict=True))
    assert (cache.reused, cache.broken) == (0, 1)
    assert path.read_bytes() == sound and str(path) in caplog.text


def test_a_write_that_fails_leaves_nothing_behind_and_is_said_once(tmp_path, monkeypatch, caplog):
    def full(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    cache = StartCache(tmp_path)
    for seed in (0, 1):
        found = cache.triplets(weight(seed), 3, "minor")
        assert all(torch.equal(*pair) for pair in zip(found, triplets(weight(seed), 3, "minor"), strict=True))
    assert not list(tmp_path.iterdir()) and cache.lost == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} cannot be written (no space left): starts are computed and not kept"
    ]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_first_decomposition(tmp_path, monkeypatch, name):
    (tmp_path / "file").write_text("x")
    forbid(monkeypatch)
    with pytest.raises(UserError, match=rf"cache .*{name} cannot be written to .*another folder, or none"):
        adapt(cache=str(tmp_path / name))


def test_bad_weights_are_refused_and_not_kept(tmp_path):
    broken = weight()
    broken[0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN or infinity"):
        StartCache(tmp_path).triplets(broken, 3, "minor")
    with pytest.raises(UserError, match="rank 9"):
        StartCache(tmp_path).triplets(weight(), 9, "minor")
    assert not list(tmp_path.iterdir())


def test_the_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/reader")
    monkeypatch.delenv("RANKWISE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_folder() == Path("/home/reader/.cache/rankwise/starts")
    monkeypatch.setenv("XDG_CACHE_HOME", "/large/cache")
    assert default_folder() == Path("/large/cache/rankwise/starts")
    monkeypatch.setenv("RANKWISE_CACHE", "~/ours")
    assert default_folder() == Path("/home/reader/ours/starts")


def adapt(**settings):
    import peft

    config = rw.MiloraConfig(r=4, target_modules=tiny.TARGETS["llama"], **settings)
    return peft.get_peft_model(tiny.make("llama"), config)


def test_a_config_with_a_cache_decomposes_once(tmp_path, monkeypatch):
    folder = str(tmp_path / "starts")
    plain = tiny.layers(adapt())
    first = tiny.layers(adapt(cache=folder))
    assert len(list((tmp_path / "starts").iterdir())) == len(first) == 6
    forbid(monkeypatch)
    second = tiny.layers(adapt(cache=folder, lora_alpha=2))  # alpha is no part of the decomposition
    for name, layer in plain.items():
        assert torch.equal(first[name].lora_A["default"].weight, layer.lora_A["default"].weight)
        scaled = second[name].lora_A["default"].weight * 0.5**0.5
        torch.testing.assert_close(scaled, layer.lora_A["default"].weight)


def test_a_large_model_says_how_far_it_is(caplog):
    with caplog.at_level("INFO", logger="rankwise"):
        adapt()
    told = [record.getMessage() for record in caplog.records]
    assert told[-1] == "adapter default: 6 of 6 modules started"
    assert len(told) == 6


def test_what_belongs_to_this_machine_is_not_saved(tmp_path):
    model = adapt(cache=str(tmp_path / "starts"), start_device="cpu")
    model.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert "start_device" not in text and str(tmp_path) not in text
    assert rw.MiloraConfig.from_pretrained(tmp_path / "saved").cache is None


@pytest.mark.parametrize("device", ["cpu:oak", "oak"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(UserError, match=rf"start_device '{device}' cannot be used"):
        adapt(start_device=device)
