"""What lists of recommendations are like, whether or not they are right: how much of the catalogue, how popular."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

from rankwise.errors import UserError

Lists = Sequence[Sequence[str]]
HEAD, TAIL = "1 head", "3 tail"
MIDDLE = "2 middle"


def coverage(lists: Lists, catalogue: Sequence[str]) -> float:
    """Share of the catalogue's titles that stand in at least one list.

    Raises:
        UserError: the catalogue is empty, or a list has a title that is not in it.
    """
    known = set(catalogue)
    if not known:
        raise UserError("the catalogue is empty: a share of it needs at least one title")
    shown = {title for titles in lists for title in titles}
    if shown - known:
        raise UserError(f"{sorted(shown - known)[0]!r} is recommended, and is not in the catalogue")
    return len(shown) / len(known)


def novelty(lists: Lists, popularity: Mapping[str, int], catalogue: Sequence[str]) -> float:
    """Mean self-information of what is recommended, in bits: -log2 of a title's share of all interactions.

    Each title of the catalogue counts one interaction more than it has, so that those without any have a share.

    Args:
        lists: of titles, one list a user.
        popularity: how often each title occurs in the training part.
        catalogue: all titles.

    Raises:
        UserError: nothing is recommended.

    Source: Zhou et al., Solving the apparent diversity-accuracy dilemma of recommender systems (2010).
    """
    total = sum(popularity.get(title, 0) + 1 for title in catalogue)
    shares = [(popularity.get(title, 0) + 1) / total for title in _all(lists)]
    return float(-np.log2(shares).mean())


def popularity_lift(lists: Lists, histories: Lists, popularity: Mapping[str, int]) -> float:
    """How much more popular the recommended titles are than those of the users' own histories: 0 is as much, 1 twice.

    The mean over users of the mean popularity of their lists, over the same of their histories, less 1.

    Args:
        lists: of titles, one list a user.
        histories: what each user had before, in the same order.
        popularity: how often each title occurs in the training part.

    Raises:
        UserError: lists and histories differ in number, one of them is empty, or no history has a popular title.

    Source: Abdollahpouri et al., The unfairness of popularity bias in recommendation (2019).
    """
    if len(lists) != len(histories):
        raise UserError(f"{len(lists)} lists and {len(histories)} histories: each user has one of each")
    before, after = (_mean_popularity(each, popularity) for each in (histories, lists))
    if not before:
        raise UserError("no title of a history occurs in the training part: a lift has nothing to be compared with")
    return after / before - 1


def popularity_groups(titles: Sequence[str], popularity: Mapping[str, int]) -> Shaped[np.ndarray, " titles"]:
    """Of each title its group: with those of the head a third of all interactions, with the middle's the next third.

    Args:
        titles: such as the true items of cases.
        popularity: how often each title occurs in the training part.

    Returns:
        ``1 head``, ``2 middle`` or ``3 tail``; titles that never occur are in the tail.
    """
    ordered = sorted(popularity, key=lambda title: (-popularity[title], title))
    before = np.cumsum([0, *(popularity[title] for title in ordered)])
    bounds = before[-1] / 3, 2 * before[-1] / 3
    names = {
        title: HEAD if start < bounds[0] else MIDDLE if start < bounds[1] else TAIL
        for title, start in zip(ordered, before, strict=False)
    }
    return np.array([names.get(title, TAIL) if popularity.get(title) else TAIL for title in titles])


def activity_groups(chosen: Sequence[int]) -> Shaped[np.ndarray, " cases"]:
    """Of each case the group of its user: about a third of the cases are of users that chose fewest titles, and so on.

    Args:
        chosen: titles of each case's user.

    Returns:
        The groups by the number of titles, such as ``1 up to 20``, ``2 up to 65``, ``3 more``; users that chose as many
        are in one group, so that there may be fewer than three.
    """
    few, some = (int(bound) for bound in np.quantile(chosen, [1 / 3, 2 / 3], method="lower"))
    names = (f"1 up to {few}", f"2 up to {some}", "3 more")
    return np.array([names[int(number > few) + int(number > some)] for number in chosen])


def _mean_popularity(lists: Lists, popularity: Mapping[str, int]) -> float:
    _all(lists)
    if not all(lists):
        raise UserError(f"list {[bool(titles) for titles in lists].index(False) + 1} is empty: leave its user out")
    return float(np.mean([np.mean([popularity.get(title, 0) for title in titles]) for titles in lists]))


def _all(lists: Lists) -> list[str]:
    found = [title for titles in lists for title in titles]
    if not found:
        raise UserError("nothing is recommended: a mean needs at least one title")
    return found
