"""Lines on a console."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def say(console: Console, text: str, dim: bool = False) -> None:
    """Print a text as it is: ``[q_proj]`` in it would vanish as markup of rich's, and ``[/INST]`` raise an error."""
    console.print(text, style="dim" if dim else None, markup=False, highlight=False)
