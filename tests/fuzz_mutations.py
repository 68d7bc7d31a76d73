"""Broken copies of a sound file: bytes flipped, cut and put in, and the values of JSON, YAML and headers changed."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from random import Random
from typing import Any

from rankwise.reading import parse_yaml

TOKENS = (
    *(b"[" * 5000, b"{" * 5000, b'{"a":' * 2000, b"- " * 2000, b"? " * 100, b"9" * 5000, b"0x" + b"f" * 5000, b"0b_"),
    *(b"NaN", b"-Infinity", b"1e999", b"\\ud800", b"\\U00110000", b"\\uFFFFFFFF", b"&a ", b"*a", b"<<: ", b"!!int "),
    *(
        b"!!python/name:os.system ",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\r",
        b"\n",
        b'"',
        b"'",
        b",",
        b"::",
    ),
    *(b"\xe2\x80\xa8", b"\xc2\xb2", b"{}", b"[]", b"null", b"---\n", b"%", b"$HOME", b"~nobody/", b"../../"),
)
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        0,
        -1,
        1,
        2**31,
        2**63,
        -(2**63) - 1,
        10**400,
        0.5,
        1e308,
        math.nan,
        math.inf,
        "",
        " ",
        "\0",
        "\ud800",
    ),
    *("../../x", "/etc/passwd", "..", "~nobody/x", "$NOT_SET", "²", "a" * 5000, "1", "nan", "{title}", "{", "\u2028"),
    *([], {}, [[]], [None], {"": None}, {"a": {"b": [1, {"c": 2}]}}, [[[[0.5]]]], "2020-99-99", "-" * 300),
)


def mutated(content: bytes, random: Random) -> bytes:
    """The content with one to three changes."""
    for _ in range(random.choice((1, 1, 2, 3))):
        content = random.choice(CHANGES)(content, random)
    return content


def _cut(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content) + 1)]


def _flip(content: bytes, random: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(random.choice((1, 2, 8)) if changed else 0):
        changed[random.randrange(len(changed))] = random.choice((0, 1, 127, 128, 255, random.randrange(256)))
    return bytes(changed)


def _put_in(content: bytes, random: Random) -> bytes:
    at = random.randrange(len(content) + 1)
    return content[:at] + random.choice(TOKENS) + content[at + random.choice((0, 0, 1, 5)) :]


def _move(content: bytes, random: Random) -> bytes:
    first, last = sorted(random.randrange(len(content) + 1) for _ in range(2))
    return random.choice((content[:first] + content[last:], content[:last] + content[first:], content[first:last]))


def _encode(content: bytes, random: Random) -> bytes:
    text = content.decode("utf-8", errors="replace")
    return text.encode(random.choice(("utf-16", "utf-32", "utf-8-sig", "latin-1")), errors="replace")


def _within(content: bytes, random: Random) -> bytes:
    """A change of the values inside: of a line, where the lines are JSON; of what is compressed; of a header."""
    if content[:2] == b"\x1f\x8b":
        return _in_gzip(content, random)
    length = int.from_bytes(content[:8], "little")
    if 8 < length < len(content):
        return _in_header(content, length, random)
    lines = content.split(b"\n")
    at = random.randrange(len(lines))
    for parse in (json.loads, _yaml):
        for text, replaced in ((content, None), (lines[at], at)):
            try:
                value = parse(text)
            except Exception:
                continue
            if isinstance(value, dict | list):
                written = json.dumps(_changed(value, random), default=str).encode()
                return written if replaced is None else b"\n".join([*lines[:at], written, *lines[at + 1 :]])
    return _put_in(content, random)


def _yaml(text: bytes) -> Any:
    return parse_yaml(text.decode(), "text") if b": " in text and len(text) < 1000 else None


def _in_gzip(content: bytes, random: Random) -> bytes:
    try:
        return gzip.compress(mutated(gzip.decompress(content), random), mtime=0)
    except (OSError, EOFError, ValueError, zlib.error):
        return _flip(content, random)


def _in_header(content: bytes, length: int, random: Random) -> bytes:
    """A safetensors file whose header says something else."""
    try:
        header = json.dumps(_changed(json.loads(content[8 : 8 + length]), random)).encode()
    except (ValueError, RecursionError):
        return _flip(content, random)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def _changed(value: Any, random: Random) -> Any:
    """The value with one of those inside it replaced, removed or moved."""
    places = list(_places(value))
    if not places:
        return random.choice(VALUES)
    outer, key = random.choice(places)
    match random.randrange(6):
        case 0:
            del outer[key]
        case 1:
            other, name = random.choice(places)
            outer[key] = json.loads(json.dumps(other[name], default=str))
        case 2 if isinstance(outer, dict):
            outer[random.choice(("", "a", "²", "\ud800", "x" * 300, f"{key} "))] = outer.pop(key)
        case 3:
            outer[key] = [outer[key]]
        case _:
            outer[key] = random.choice(VALUES)
    return value


def _places(value: Any) -> Any:
    """Every place inside a value: what holds it, and the key or position."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


CHANGES = (_cut, _flip, _put_in, _put_in, _move, _encode, _within, _within, _within, _within)
