"""Ranking a whole catalogue after a prompt: the walk over its trie, batches of titles, and the search for the best.

The model, the titles and the histories are those of a finished run on interactions (``rankwise train``), whose prompts
are filled with titles of a history up to a number of tokens:

    python benchmarks/bench_catalogue.py RUN --prompts 8 --runs 3

The walk and the batches of 64 titles after the prompt's cache score every title; so do whole sequences, of which only
some batches are measured, and scaled up. The search gives the ten best; that they are those of the walk is checked.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from rankwise import load_recommender
from rankwise.likelihood import answer_log_probabilities
from rankwise.recommend.ranking import EncodedCase, score_continued
from rankwise.recommend.recommender import Recommender
from rankwise.tokenise import IGNORED, encode_prompt, pad_left
from rankwise.trees import TopAnswers, score_catalogue, top_answers
from timing import interleaved, machine, ratio, seconds, spread, table

BATCH, TOP = 64, 10
WALK, CACHED, SEARCH, SEARCH_MEAN = (
    "walk of the trie",
    "batches of 64 after a cache",
    "search, top 10",
    "search by mean",
)
Prompt = list[int]


def prompts_of(recommender: Recommender, count: int, length: int) -> list[Prompt]:
    """Prompts of at most ``length`` tokens, each with as many of a user's latest titles as fit."""
    template, found = recommender.store.template, []
    for user in recommender.store.histories["user"]:
        history = recommender.store.history(user)
        for shown in range(1, len(history) + 1):
            ids = encode_prompt(recommender._tokenizer, template.render(history[-shown:]), 10 * length)
            if len(ids) > length:
                break
            prompt = ids
        else:
            continue  # too short a history
        if shown > 1:
            found.append(prompt)
        if len(found) == count:
            return found
    raise SystemExit(f"{len(found)} users have a history of {length} tokens; {count} are wanted")


def cached(recommender: Recommender, prompts: list[Prompt]) -> torch.Tensor:
    """Every title, 64 at a time, after copies of the prompt's cache."""
    answers, padding, rows = recommender._answers, recommender._padding, []
    for prompt in prompts:
        parts = [EncodedCase(prompt, answers[start : start + BATCH]) for start in range(0, len(answers), BATCH)]
        scored = (score_continued(recommender.model, [part], padding, 10**9)[0] for part in parts)
        rows.append(torch.cat([torch.from_numpy(part) for part in scored]))
    return torch.stack(rows)


@torch.no_grad()
def whole(recommender: Recommender, prompt: Prompt, batches: int) -> tuple[float, torch.Tensor]:
    """Seconds for every title as whole sequences, from some batches in equal distances, and the scores of the first."""
    answers, padding, taken, first = recommender._answers, recommender._padding, [], torch.empty(0)
    starts = list(range(0, len(answers), BATCH))
    for start in starts[:: max(1, len(starts) // batches)]:
        rows = [prompt + answer for answer in answers[start : start + BATCH]]
        begun = time.perf_counter()
        ids, mask = pad_left(rows, padding)
        lengths = torch.tensor([len(answer) for answer in answers[start : start + BATCH]])
        behind = ids.shape[1] - torch.arange(ids.shape[1])
        labels = ids.masked_fill(behind > lengths[:, None], IGNORED)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        values, _ = answer_log_probabilities(recommender.model, batch)
        taken.append(time.perf_counter() - begun)
        first = first if len(first) else values.sum(dim=1)
    return statistics.median(taken) * len(starts), first


def search(recommender: Recommender, prompts: list[Prompt], by_mean: bool) -> list[TopAnswers]:
    """The ten best after each prompt."""
    model, trie, padding = recommender.model, recommender.trie, recommender._padding
    return [top_answers(model, [one], trie, TOP, padding, length_normalised=by_mean)[0] for one in prompts]


def walk(recommender: Recommender, prompts: list[Prompt]) -> torch.Tensor:
    """Every title's score after each prompt."""
    model, trie, padding = recommender.model, recommender.trie, recommender._padding
    return torch.cat([score_catalogue(model, [one], trie, padding) for one in prompts])


def off_the_best(found: list[TopAnswers], scores: torch.Tensor) -> float:
    """The largest difference of the scores that a search found from the best ones."""
    best = scores.sort(dim=1, descending=True).values[:, :TOP]
    return (torch.tensor([one.scores for one in found]) - best).abs().max().item()


def compare(recommender: Recommender, prompts: list[Prompt], runs: int, batches: int) -> list[list[str]]:
    """Rows of the table."""
    ways: dict[str, Callable[[], object]] = {
        WALK: lambda: walk(recommender, prompts),
        CACHED: lambda: cached(recommender, prompts),
        SEARCH: lambda: search(recommender, prompts, False),
        SEARCH_MEAN: lambda: search(recommender, prompts, True),
    }
    found = interleaved({way: lambda one=one: seconds(one) for way, one in ways.items()}, runs)  # type: ignore[misc]
    walked = walk(recommender, prompts).double()
    long, first = whole(recommender, prompts[0], batches)
    notes = {
        WALK: (str(recommender.trie.nodes), ""),
        CACHED: ("", f"{(cached(recommender, prompts) - walked).abs().max():.1e}"),
    }
    for way, scores in ((SEARCH, walked), (SEARCH_MEAN, walked / recommender.trie.lengths)):
        results = search(recommender, prompts, way == SEARCH_MEAN)
        read = f"{statistics.median(one.read for one in results):.0f}"
        notes[way] = (read, f"{off_the_best(results, scores):.1e}")
    rows = [
        [way, spread([one / len(prompts) for one in found[way]]), ratio(found[way], found[WALK]), *notes[way]]
        for way in ways
    ]
    times = long * len(prompts) / statistics.median(found[WALK])
    off = (first - walked[0, : len(first)]).abs().max().item()
    return [*rows, ["whole sequences, 64 at a time", f"{long:.1f} s", f"{times:.1f}", "", f"{off:.1e}"]]


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished run on interactions")
    parser.add_argument("--stage", help="whose adapter to take (the last one's)")
    parser.add_argument("--prompts", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--length", type=int, default=300, help="tokens of a prompt, at most (%(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="of each way (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--whole", type=int, default=8, help="batches of whole sequences (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recommender = load_recommender(options.run, options.stage)
    prompts = prompts_of(recommender, options.prompts, options.length)
    rows = compare(recommender, prompts, options.runs, options.whole)
    lengths = [len(one) for one in prompts]
    print(machine(options.threads))
    print(f"{len(recommender.trie)} titles; {len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, one at")
    print(f"a time; {options.runs} runs in turns: median (least to most)\n")
    print(table(["way", "seconds a prompt", "times the walk's", "nodes read", "largest difference"], rows))


if __name__ == "__main__":
    main()
