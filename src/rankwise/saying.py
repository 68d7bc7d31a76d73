"""Lines on a console."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def say(console: Console, text: str, dim: bool = False) -> None:
    """Print a text as it is, a line as one line, from which a path can be copied.

    As markup of rich's ``[q_proj]`` would vanish from it, and ``[/INST]`` raise an error.
    """
    console.print(text, style="dim" if dim else None, markup=False, highlight=False, soft_wrap=True)
