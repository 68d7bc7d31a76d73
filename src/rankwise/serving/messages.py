"""What a request and its answer hold."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_TITLES, MOST_TOP, LONGEST = 200, 100, 1000
Text = Annotated[str, Field(min_length=1, max_length=LONGEST)]


class RecommendRequest(BaseModel):
    """Whose next titles are wanted: a user's of the log, or those after a history."""

    model_config = ConfigDict(extra="forbid")

    user: Text | None = Field(None, description="A user of the log that the model was trained on.")
    history: list[Text] | None = Field(
        None, min_length=1, max_length=MOST_TITLES, description="Titles or ids of items, oldest first."
    )
    candidates: list[Text] | None = Field(
        None, min_length=2, max_length=MOST_TITLES, description="Rank these, and not the catalogue."
    )
    stages: list[Text] | None = Field(
        None, min_length=1, max_length=16, description="Of training, whose models answer; the last one if not given."
    )
    top: int = Field(10, ge=1, le=MOST_TOP, description="Titles of an answer, at most.")
    exclude_seen: bool = Field(True, description="Leave the titles of the history out.")

    @model_validator(mode="after")
    def _one_of_both(self) -> RecommendRequest:
        if (self.user is None) == (self.history is None):
            raise ValueError("give either user or history")
        return self


class Recommended(BaseModel):
    """A title and how probable it is after the history."""

    title: str
    score: float = Field(description="Log-probability of the title after the prompt, in nats.")
    items: list[str] = Field(description="Ids of the items of that title.")


class StageRanking(BaseModel):
    """What the model of one stage recommends, the best first."""

    stage: str
    recommendations: list[Recommended]


class RecommendResponse(BaseModel):
    """The history as it was understood, and a ranking for each stage."""

    history: list[str]
    rankings: list[StageRanking]


class Titles(BaseModel):
    """Titles that a text may mean, the likeliest first."""

    titles: list[str]


class StageList(BaseModel):
    """The run, its stages of training in their order, and how much it knows."""

    name: str
    stages: list[str]
    titles: int
    users: int


class Health(BaseModel):
    """Whether the server answers."""

    status: str
    version: str


class Problem(BaseModel):
    """What is wrong with a request."""

    detail: str
