"""A SYNTHETIC log of film ratings, made by a seeded generator; no film and no user in it is real.

Users have one or two favourite genres and like to follow a series they began: part 1, then 2, then 3. Titles
are composed of plain English words that belong to their genre ("Curse of the Grave"), and a part has its
number after the title of the first. So a model that reads titles can tell genre and series, and predict
better than popularity, which is only mildly skewed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import polars as pl

from rankwise.errors import UserError
from rankwise.files import write_text

# genre: adjectives and nouns of "The Haunted Manor", openers of "Curse of the Manor"
_WORDS: dict[str, tuple[str, str, str]] = {
    "Horror": (
        "Haunted Cursed Bloody Screaming Evil Dead",
        "Manor Grave Vampire Witch Zombie Ghost",
        "Curse Nightmare",
    ),
    "Western": (
        "Lonesome Dusty Wild Outlaw Frontier Rugged",
        "Saloon Sheriff Ranch Cowboy Canyon Prairie",
        "Trail Ride",
    ),
    "Romance": (
        "Tender Romantic Loving Blushing Parisian Charming",
        "Bride Kiss Heart Wedding Lover Dance",
        "Summer Song",
    ),
    "Crime": (
        "Corrupt Stolen Crooked Undercover Guilty Ruthless",
        "Detective Heist Gangster Murder Alibi Witness",
        "Case Arrest",
    ),
    "Science Fiction": (
        "Alien Cosmic Lunar Robot Galactic Martian",
        "Planet Starship Galaxy Android Asteroid Computer",
        "Voyage Invasion",
    ),
    "War": (
        "Wounded Fallen Captured Brave Marching Decorated",
        "Soldier Battalion Regiment Bunker Pilot Submarine",
        "Battle Siege",
    ),
    "Comedy": (
        "Clumsy Crazy Goofy Silly Ridiculous Drunken",
        "Roommate Neighbor Babysitter Vacation Salesman Waiter",
        "Revenge Confessions",
    ),
    "Fantasy": (
        "Enchanted Magic Golden Ancient Mystic Winged",
        "Sword Wizard Kingdom Unicorn Castle Dragon",
        "Legend Quest",
    ),
}


@dataclass(frozen=True)
class SyntheticSettings:
    """Size and tastes of the synthetic log; every item and rating follows from these."""

    users: int = 300
    interactions: int = 14  # mean for a user; each has between 8 and 20 at this mean
    series: int = 5  # in each of the 8 genres
    parts: int = 3  # of each series
    singles: int = 16  # films without a sequel, in each genre
    loyalty: float = 0.9  # probability that a pick is of a favourite genre
    sequels: float = 0.55  # probability of the next part where a series was begun
    skew: float = 1.0  # popularity of the n-th film of a genre falls as n ** -skew
    seed: int = 0


@dataclass(frozen=True)
class _Film:
    item: str
    title: str
    genre: str
    sequel_of: str | None  # the item to be seen before
    weight: float  # popularity among the films of its genre


def synthetic_log(settings: SyntheticSettings | None = None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The ratings (``user, item, rating, timestamp``) and the items (``item, title, genres``).

    They are the same for the same settings.

    Raises:
        UserError: the settings ask for more titles than the words allow, or for nothing.
    """
    settings = settings or SyntheticSettings()
    _check(settings)
    films = _catalogue(settings)
    ratings = [row for user in range(1, settings.users + 1) for row in _ratings_of(user, films, settings)]
    schema = {"user": pl.String, "item": pl.String, "rating": pl.Float64, "timestamp": pl.Int64}
    items = [(film.item, film.title, film.genre) for film in films]
    return (
        pl.DataFrame(ratings, schema=schema, orient="row"),
        pl.DataFrame(items, schema={"item": pl.String, "title": pl.String, "genres": pl.String}, orient="row"),
    )


def write_synthetic(folder: Path, settings: SyntheticSettings | None = None) -> tuple[Path, Path]:
    """Write the log as ``ratings.csv`` and ``items.csv``, so that it is read as a user's own files are."""
    ratings, items = synthetic_log(settings)
    paths = Path(folder) / "ratings.csv", Path(folder) / "items.csv"
    for path, table in zip(paths, (ratings, items), strict=True):
        write_text(path, table.write_csv())
    return paths


def _check(settings: SyntheticSettings) -> None:
    titles, most = settings.series + settings.singles, len(_titles_of("Horror"))
    if settings.users < 1 or settings.interactions < 3 or settings.parts < 1:
        raise UserError(
            f"users = {settings.users}, interactions = {settings.interactions}, parts = {settings.parts}:"
            " at least 1, 3 and 1"
        )
    if not 1 <= titles <= most:
        raise UserError(f"series + singles = {titles}: between 1 and {most} titles can be composed for a genre")
    films = len(_WORDS) * (settings.series * settings.parts + settings.singles)
    if films < 2 * settings.interactions:
        raise UserError(
            f"{films} films are too few for {settings.interactions} interactions a user; ask for more series"
        )


def _titles_of(genre: str) -> list[str]:
    adjectives, nouns, openers = (words.split() for words in _WORDS[genre])
    named = [f"The {adjective} {noun}" for adjective, noun in product(adjectives, nouns)]
    return named + [f"{opener} of the {noun}" for opener, noun in product(openers, nouns)]


def _catalogue(settings: SyntheticSettings) -> list[_Film]:
    """All films, each genre's in its order of popularity; a sequel follows its first part at once."""
    generator = random.Random(f"{settings.seed}:films")
    films: list[_Film] = []
    for genre in _WORDS:
        titles = generator.sample(_titles_of(genre), settings.series + settings.singles)
        serial = set(generator.sample(titles, settings.series))
        for place, title in enumerate(titles, start=1):
            before = None
            for part in range(1, (settings.parts if title in serial else 1) + 1):
                item = f"f{len(films) + 1}"
                films.append(
                    _Film(item, title if part == 1 else f"{title} {part}", genre, before, place**-settings.skew)
                )
                before = item
    return films


def _ratings_of(user: int, films: list[_Film], settings: SyntheticSettings) -> list[tuple[str, str, float, int]]:
    generator = random.Random(f"{settings.seed}:user:{user}")
    favourites = generator.sample(list(_WORDS), generator.choice((1, 2)))
    spread = settings.interactions * 3 // 7
    length = settings.interactions + generator.randint(-spread, spread)
    time = 1_600_000_000 + generator.randrange(30_000_000)
    rows: list[tuple[str, str, float, int]] = []
    seen: list[str] = []
    for _ in range(length):
        film = _pick(generator, films, favourites, seen, settings)
        seen.append(film.item)
        time += generator.randrange(3_600, 1_200_000)
        low, high = (6, 10) if film.genre in favourites else (2, 7)
        rows.append((f"u{user}", film.item, generator.randint(low, high) / 2, time))
    return rows


def _pick(
    generator: random.Random,
    films: list[_Film],
    favourites: list[str],
    seen: list[str],
    settings: SyntheticSettings,
) -> _Film:
    """The next part of the series last seen, or a new film that is no sequel, mostly of a favourite genre."""
    met = set(seen)
    sequels = [film for film in films if film.sequel_of in met and film.item not in met]
    if sequels and generator.random() < settings.sequels:
        return max(sequels, key=lambda film: seen.index(str(film.sequel_of)))
    fresh = [film for film in films if film.item not in met and film.sequel_of is None]
    liked = [film for film in fresh if film.genre in favourites]
    pool = liked if liked and generator.random() < settings.loyalty else fresh or sequels
    return generator.choices(pool, [film.weight for film in pool])[0]
