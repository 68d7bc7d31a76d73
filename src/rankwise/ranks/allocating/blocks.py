"""Forward passes that begin at a block of the model, with what the blocks before it gave: nothing changed in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn


class Blocks:
    """The blocks of a model, the first of which can be passed over.

    Blocks are the items of its ``ModuleList`` s, as far as each is called once in a pass. What a block gives depends on
    itself and on what was called before it, whatever the architecture. Of the blocks that are passed over, each gives
    what the last of them in its list gave, which is all that anybody looks at.

    Args:
        model: in evaluation mode, whose passes are on the same rows each time.
        run: a forward pass, and a number that depends on it.
    """

    def __init__(self, model: nn.Module, run: Callable[[], float]) -> None:
        self._run, self._given = run, dict[int, Any]()
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        inner = {id(module) for one in lists for item in one for module in item.modules()}
        self._list = {block: id(one) for one in lists if id(one) not in inner for block in one}
        self._order: list[nn.Module] = []
        self._begin = 0
        called: list[nn.Module] = []
        with ExitStack() as hooks:
            for block in self._list:
                hooks.enter_context(block.register_forward_pre_hook(lambda block, _: called.append(block)))
            whole = run()
        if len(set(called)) == len(called) and self._holds(called, whole):
            self._order = called

    def _holds(self, order: list[nn.Module], whole: float) -> bool:
        """Whether a pass that begins at the last block ends as a whole one, time and again."""
        self._order = order
        try:
            with self.passed_over():
                self.begin_at(len(order) - 1)
                return self._run() == self._run() == whole
        except Exception:  # of a model that looks at what the blocks before have left elsewhere, say
            return False
        finally:
            self._order = []

    def place(self, layer: nn.Module) -> int:
        """Of the block that a layer is in; 0 where it is in none."""
        places = [place for place, block in enumerate(self._order) if any(one is layer for one in block.modules())]
        return places[0] if places else 0

    @contextmanager
    def passed_over(self) -> Iterator[None]:
        """At the end of the block of code, passes are whole ones again."""
        before = {block: vars(block).get("forward") for block in self._order}
        try:
            yield
        finally:
            self._begin = 0
            self._given.clear()
            for block, own in before.items():
                vars(block).pop("forward", None)
                if own is not None:
                    block.forward = own

    def begin_at(self, place: int) -> None:
        """From now on begin at this block, or go on to begin at the present one where that is later."""
        if place <= self._begin:
            return
        last = {self._list[block]: block for block in self._order[:place]}
        with ExitStack() as hooks:
            for one, block in last.items():
                hooks.enter_context(block.register_forward_hook(partial(self._keep, one)))
            self._run()
        for block in self._order[:place]:
            block.forward = partial(self._again, self._list[block])
        self._begin = place

    def _keep(self, one: int, block: nn.Module, arguments: Any, given: Any) -> None:
        self._given[one] = given

    def _again(self, one: int, *arguments: Any, **named: Any) -> Any:
        return self._given[one]
