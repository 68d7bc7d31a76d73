"""Reading what somebody else may have written or broken: YAML, JSON and safetensors, each with one clear error."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from rankwise.errors import UserError, cut, shown

MOST_YAML = 2**17  # bytes: PyYAML takes seconds for as many
DEPTH = 32  # of lists and mappings within one another
LONGEST_NAME = 255  # bytes of a file's name
NO_NAME = re.compile(r"[\0\ud800-\udfff]")  # no file's name has these: NUL, and halves of surrogate pairs
DEEP = f"more than {DEPTH} lists and mappings within one another"


class _Loader(yaml.SafeLoader):
    """YAML's safe loader for plain data: no tags, no aliases, no key twice, nothing nested deep, no huge numbers."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The composer's hook for each value, before it goes on to those inside."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(
                f"the alias *{event.anchor} is not read, write out what it stands for{event.start_mark}"
            )
        if event.tag is not None:
            raise yaml.YAMLError(f"the tag {event.tag} is not read, leave it out{event.start_mark}")
        if isinstance(event, yaml.ScalarEvent):
            event.value.encode()  # half of a surrogate pair can be escaped, and is no text
        self.depth += 1
        if self.depth > DEPTH:
            raise yaml.YAMLError(f"{DEEP}{event.start_mark}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The constructor's hook: YAML itself keeps the last of several equal keys and says nothing."""
        seen: set[Any] = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if not isinstance(key, Hashable):
                raise yaml.YAMLError(f"{shown(key)} is no key{node.start_mark}")
            if key in seen:
                raise yaml.YAMLError(f"the key {shown(key)} stands twice{node.start_mark}")
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_whole(self, node: yaml.ScalarNode) -> int:
        """A whole number, as JSON may have it."""
        try:
            value = int(self.construct_yaml_int(node))
        except ValueError:  # 0x_, or more digits than Python reads
            value = 2**63
        if not -(2**63) <= value < 2**63:
            raise yaml.YAMLError(f"{shown(node.value)} is no whole number of 64 bits{node.start_mark}")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole)


def parse_yaml(text: str, source: str) -> Any:
    """Plain data out of YAML.

    Args:
        text: without tags and aliases; it takes seconds to parse 100,000 characters.
        source: names it in messages.

    Raises:
        UserError: it is no such YAML.
    """
    try:
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"{source} is no valid YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path, what: str) -> Any:
    """Plain data out of a YAML file; ``what`` it is goes before its path in messages.

    Raises:
        UserError: there is no such file, or it cannot be read as UTF-8, or not by :func:`parse_yaml`.
    """
    return parse_yaml(read_yaml_text(path, what), f"{what} {path}")


def read_yaml_text(path: Path, what: str) -> str:
    """The text of a YAML file, before it is parsed; arguments and errors as for :func:`read_yaml`."""
    if not path.is_file():
        raise UserError(f"{what} {path} does not exist: give the path of a YAML file")
    try:
        with path.open("rb") as file:
            content = file.read(MOST_YAML + 1)
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read ({error.strerror}): see to its permissions") from error
    if len(content) > MOST_YAML:
        raise UserError(f"{what} {path} has more than {MOST_YAML} bytes, which is no {what}: give another file")
    return text


def read_json(path: Path, kind: type, remedy: str) -> Any:
    """What a JSON file holds.

    Args:
        path: of the file.
        kind: ``dict`` or ``list``.
        remedy: what to do where it is broken.

    Raises:
        UserError: there is no such file, it is no JSON in UTF-8, it holds something else, or it is nested deep.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: {remedy}")
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON ({error}): {remedy}") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} holds no JSON {'object' if kind is dict else 'list'}: {remedy}")
    return value


def parse_json(text: str) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is no JSON, is nested deep, or has a number or a character that cannot be written again.
    """
    try:
        value = json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError(DEEP) from None
    if _is_deep(value):
        raise ValueError(DEEP)
    if "\\u" in text:  # half of a surrogate pair is valid JSON and no text
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _whole(digits: str) -> int:
    """A number of 64 bits at most: larger ones cannot be used, and some not be written again."""
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"{shown(digits)} is no whole number of 64 bits")
    return int(digits)


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def read_parquet(path: Path, remedy: str, columns: list[str] | None = None) -> Any:
    """A table, a ``polars.DataFrame``, in a Parquet file.

    Args:
        path: of the file.
        remedy: what to do where it is broken.
        columns: those that are read; all by default.

    Raises:
        UserError: the file cannot be read, or lacks a column.
    """
    import polars as pl  # not needed for a recipe

    try:
        return pl.read_parquet(path, glob=False, columns=columns)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        raise UserError(f"{path} is not readable as Parquet ({first_line(error)}): {remedy}") from error


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line that is not too long."""
    return cut((str(error).strip().splitlines() or [type(error).__name__])[0], 300)


@contextmanager
def open_tensors(path: Path, remedy: str, framework: str = "pt") -> Iterator[Any]:
    """A safetensors file, open while the block runs, as ``safetensors.safe_open`` gives it.

    Args:
        path: of the file.
        remedy: what to do where it is broken.
        framework: of the tensors that it gives.

    Raises:
        UserError: the file cannot be read, or the block finds it broken.
    """
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not readable as safetensors ({first_line(error)}): {remedy}") from error


def is_file_name(name: object) -> bool:
    """Whether a name out of a file stays within the folder that it is joined to."""
    if not isinstance(name, str) or NO_NAME.search(name):
        return False
    return Path(name).name == name != ".." and 0 < len(name.encode()) <= LONGEST_NAME
