"""Ranking a whole catalogue after a prompt: the walk over its trie, batches of titles, and the search for the best.

The model, the titles and the histories are those of a finished run on interactions (``rankwise train``), whose prompts
are filled with titles of a history up to a number of tokens; without one, of a run on a synthetic log, which takes
seconds and says little of the search: its catalogue is small, and its model hardly knows it.

    python benchmarks/bench_catalogue.py --run RUN

The walk and the batches of 64 titles after the prompt's cache score every title; so do whole sequences, of which only
some batches are measured, and scaled up. The search gives the ten best; how far their scores are from the best of the
walk is in the table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankwise import load_recommender
from rankwise.likelihood import answer_log_probabilities, position_ids
from rankwise.recommend.ranking import EncodedCase, score_continued
from rankwise.recommend.recommender import Recommender
from rankwise.tokenise import IGNORED, encode_prompt, pad_left
from rankwise.trees import TopAnswers, score_catalogue, top_answers
from synthetic_run import make_run
from timing import interleaved, machine, ratio, spread, table

BATCH, TOP = 64, 10
WHOLE, FULL = "whole sequences, answers' logits", "whole sequences, all logits"
WALK, CACHED, SEARCH, SEARCH_MEAN = (
    "walk of the trie",
    "batches of 64 after a cache",
    "search, top 10",
    "search by mean",
)
Prompt = list[int]


def prompts_of(recommender: Recommender, count: int, length: int) -> list[Prompt]:
    """Prompts of the first users, each with as many of the user's latest titles as fit ``length`` tokens."""
    users = recommender.store.histories["user"].head(count)
    return [prompt_of(recommender, recommender.store.history(user), length) for user in users]


def prompt_of(recommender: Recommender, history: list[str], length: int) -> Prompt:
    """One title at least."""
    template, tokenizer = recommender.store.template, recommender._tokenizer
    prompt: Prompt = []
    for shown in range(1, len(history) + 1):
        ids = encode_prompt(tokenizer, template.render(history[-shown:]), 10 * length)
        if prompt and len(ids) > length:
            break
        prompt = ids
    return prompt


def cached(recommender: Recommender, prompts: list[Prompt]) -> torch.Tensor:
    """Every title, 64 at a time, after copies of the prompt's cache."""
    answers, padding, rows = recommender._answers, recommender._padding, []
    for prompt in prompts:
        parts = [EncodedCase(prompt, answers[start : start + BATCH]) for start in range(0, len(answers), BATCH)]
        scored = (score_continued(recommender.model, [part], padding, 10**9)[0] for part in parts)
        rows.append(torch.cat([torch.from_numpy(part) for part in scored]))
    return torch.stack(rows)


@torch.no_grad()
def whole(recommender: Recommender, prompt: Prompt, batches: int, all_logits: bool) -> tuple[float, torch.Tensor]:
    """Seconds for every title as whole sequences, from some batches in equal distances, and the scores of the first."""
    answers, taken, first = recommender._answers, list[float](), torch.empty(0)
    starts = list(range(0, len(answers), BATCH))
    for start in starts[:: max(1, len(starts) // batches)]:
        picked = answers[start : start + BATCH]
        begun = time.perf_counter()
        ids, mask = pad_left([prompt + answer for answer in picked], recommender._padding)
        behind = ids.shape[1] - torch.arange(ids.shape[1])
        lengths = torch.tensor([len(answer) for answer in picked])
        labels = ids.masked_fill(behind > lengths[:, None], IGNORED)
        score = every_logit if all_logits else answer_log_probabilities
        values, _ = score(recommender.model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
        taken.append(time.perf_counter() - begun)
        first = first if len(first) else values.sum(dim=1)
    return statistics.median(taken) * len(starts), first


def every_logit(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, None]:
    """Log-probabilities from the logits of all tokens in float32, as published code computes them."""
    labels = batch.pop("labels")[:, 1:]
    logs = model(**batch, position_ids=position_ids(batch["attention_mask"])).logits.float()[:, :-1].log_softmax(-1)
    found = logs.gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0]
    return found * (labels != IGNORED), None


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
    ways: dict[str, Callable[[], Any]] = {
        WALK: lambda: walk(recommender, prompts),
        CACHED: lambda: cached(recommender, prompts),
        SEARCH: lambda: search(recommender, prompts, False),
        SEARCH_MEAN: lambda: search(recommender, prompts, True),
    }
    results: dict[str, Any] = {}

    def timed(way: str) -> float:
        begun = time.perf_counter()
        results[way] = ways[way]()
        return time.perf_counter() - begun

    search(recommender, prompts[:1], False)  # warm
    found = interleaved({way: lambda way=way: timed(way) for way in ways}, runs, warm_up=False)  # type: ignore[misc]
    walked = results[WALK].double()
    notes = {
        WALK: (str(recommender.trie.nodes), ""),
        CACHED: ("", f"{(results[CACHED] - walked).abs().max():.1e}"),
    }
    for way, scores in ((SEARCH, walked), (SEARCH_MEAN, walked / recommender.trie.lengths)):
        read = [one.read for one in results[way]]
        nodes = f"{statistics.median(read):.0f} ({min(read)} to {max(read)})"
        notes[way] = (nodes, f"{off_the_best(results[way], scores):.1e}")
    rows = [
        [way, spread([one / len(prompts) for one in found[way]]), ratio(found[way], found[WALK]), *notes[way]]
        for way in ways
    ]
    for said, all_logits in ((WHOLE, False), (FULL, True)):
        long, first = whole(recommender, prompts[0], batches, all_logits)
        times = long * len(prompts) / statistics.median(found[WALK])
        off = (first - walked[0, : len(first)]).abs().max().item()
        rows.append([said, f"{long:.1f} s", f"{times:.1f}", "", f"{off:.1e}"])
    return rows


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a finished run on interactions (a synthetic one)")
    parser.add_argument("--stage", help="whose adapter to take (the last one's)")
    parser.add_argument("--prompts", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--length", type=int, default=300, help="tokens of a prompt, at most (%(default)s)")
    parser.add_argument("--runs", type=int, default=2, help="of each way (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--whole", type=int, default=8, help="batches of whole sequences (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        recommender = load_recommender(options.run or make_run(Path(folder)), options.stage)
    prompts = prompts_of(recommender, options.prompts, options.length)
    rows = compare(recommender, prompts, options.runs, options.whole)
    least, most = min(map(len, prompts)), max(map(len, prompts))
    print(machine(options.threads))
    print(f"{len(recommender.trie)} titles; {len(prompts)} prompts of {least} to {most} tokens, one at a time;")
    print(f"{options.runs} runs in turns: median (least to most)\n")
    print(table(["way", "seconds a prompt", "times the walk's", "nodes read", "largest difference"], rows))


if __name__ == "__main__":
    main()
