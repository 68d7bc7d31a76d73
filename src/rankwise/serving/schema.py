"""What requests ask and what answers hold."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MOST_TITLES = 200  # of a history or of candidates
MOST_TOP = 100
MOST_CHARACTERS = 500  # of a title
MOST_NODES = 2**16  # tokens of titles that a search reads, whose keys and values stay in memory
MOST_FOUND = 50  # titles that a search gives

Title = Annotated[str, StringConstraints(min_length=1, max_length=MOST_CHARACTERS)]


class Asked(BaseModel):
    """Whom to recommend to, and how."""

    model_config = ConfigDict(extra="forbid")

    history: list[Title] | None = Field(
        None,
        min_length=1,
        max_length=MOST_TITLES,
        description="Titles or item ids, oldest first; the case of letters does not matter.",
    )
    user: Annotated[str, StringConstraints(min_length=1, max_length=MOST_CHARACTERS)] | None = Field(
        None, coerce_numbers_to_str=True, description="A user of the run's log, instead of a history."
    )
    stage: str | None = Field(
        None, max_length=MOST_CHARACTERS, description="Whose recommendations; the last one's where not given."
    )
    candidates: list[Title] | None = Field(
        None,
        min_length=2,
        max_length=MOST_TITLES,
        description="Rank these, each once, instead of the whole catalogue; they may be new to it.",
    )
    top: int = Field(10, ge=1, le=MOST_TOP, strict=True, description="How many titles.")
    exclude_seen: bool = Field(True, description="Leave the history's titles out (of a whole catalogue).")
    length_normalised: bool = Field(False, description="Rank by the score per token.")
    most_nodes: int | None = Field(
        None,
        ge=1,
        le=MOST_NODES,
        strict=True,
        description="Tokens of a whole catalogue's titles to read at most; the ranking may then not be exact.",
    )

    @model_validator(mode="after")
    def _whom(self) -> Asked:
        if (self.history is None) == (self.user is None):
            raise ValueError("give either history or user")
        return self


class Recommended(BaseModel):
    """A title of a ranking."""

    title: str
    score: float = Field(description="Log-probability in nats; per token where lengths are normalised.")
    items: list[str] = Field(description="Ids of the items that have the title.")


class Answer(BaseModel):
    """A ranking, the highest score first."""

    stage: str
    exact: bool = Field(description="Whether no other title can be better.")
    history: list[str] = Field(description="The titles after which it is, oldest first.")
    recommendations: list[Recommended]


class FoundTitle(BaseModel):
    """A title of the catalogue."""

    title: str
    items: list[str]


class FoundTitles(BaseModel):
    """Titles that fit a query, the best first."""

    titles: list[FoundTitle]


class Stage(BaseModel):
    """A stage of the run."""

    name: str
    kind: str = Field(description="base, sft or softmax_dpo.")


class ServedStages(BaseModel):
    """The stages of the run in the order of training, and the two to compare."""

    run: str
    stages: list[Stage]
    before: str
    after: str


class Health(BaseModel):
    """Whether requests are answered."""

    status: str


class Problem(BaseModel):
    """Why a request was not answered."""

    detail: str
    closest: list[str] | None = Field(None, description="Titles that an unknown one may have meant.")
