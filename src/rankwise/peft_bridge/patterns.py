"""Regular expressions that PEFT matches with the names of modules: one out of a file may be made to take for ever."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rankwise.errors import UserError, shown

SECONDS = 10.0  # that all patterns of an adapter may take with all names
# How PEFT matches each of a configuration's patterns.
WHOLE, END, LAYERS = "{}", "(.*\\.)?({})$", ".*\\.({})\\.(\\d+)\\."
FORMS = {
    "target_modules": WHOLE,
    "exclude_modules": WHOLE,
    "rank_pattern": END,
    "alpha_pattern": END,
    "layers_pattern": LAYERS,
}
PLAIN = re.compile(r"\^?[\w.\\-]*\$?")  # nothing in it repeats or branches
# The clock starts with the work: on a busy machine an interpreter may take seconds to begin.
CODE = """
import faulthandler, json, re, sys
seconds, patterns, names = json.load(sys.stdin)
faulthandler.dump_traceback_later(seconds, exit=True)
for number, pattern in enumerate(patterns):
    print(number, flush=True)
    found = re.compile(pattern)
    for name in names:
        found.match(name), found.fullmatch(name)
"""


def check_patterns(config: Mapping[str, Any], names: Iterable[str], where: str = "") -> None:
    """See that the patterns of an adapter's configuration come to an end on these names.

    Those that repeat or branch are tried in a process of their own, which ends itself after ``SECONDS``.

    Args:
        config: the values of a PEFT configuration.
        names: of the base's modules.
        where: before the name of a setting, in messages.

    Raises:
        UserError: one is no regular expression, or takes too long.
    """
    wanted = list(_patterns(config))
    for key, pattern in wanted:
        try:
            re.compile(pattern)
            re.compile(FORMS[key].format(pattern))
        except (re.error, RecursionError, OverflowError) as error:
            raise UserError(f"{where}{key} {shown(pattern)} is no regular expression ({error}): correct it") from error
    wanted = [(key, pattern) for key, pattern in wanted if not PLAIN.fullmatch(pattern)]
    if not wanted:
        return
    asked = json.dumps([SECONDS, [FORMS[key].format(pattern) for key, pattern in wanted], list(names)])
    done = subprocess.run([sys.executable, "-I", "-c", CODE], input=asked.encode(), capture_output=True, check=False)
    if done.stderr.startswith(b"Timeout"):
        key, pattern = wanted[max(0, len(done.stdout.split()) - 1)]
        raise UserError(
            f"{where}{key} {shown(pattern)} takes more than {SECONDS:g} s on the names of the model's modules: "
            "write it without repetitions within one another, or list the names"
        )


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The settings that are matched as patterns: texts, and the keys of tables; lists have plain names."""
    for key in FORMS:
        value = config.get(key)
        if isinstance(value, str):
            yield key, value
        elif isinstance(value, Mapping):
            yield from ((key, str(pattern)) for pattern in value)
        elif key == "layers_pattern" and isinstance(value, list):
            yield from ((key, str(pattern)) for pattern in value)
