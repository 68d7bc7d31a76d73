"""Scoring candidates after a shared prompt: with the prompt's cache, against one whole sequence for each candidate.

Both give the same scores; the largest difference is in the table. Each measurement of memory is a process of its own:
the largest resident memory after scoring, less the largest once the model and the data were there (Linux only).
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rankwise.likelihood import answer_log_probabilities
from rankwise.models import load_language_model, load_tokenizer, quiet_libraries
from rankwise.recommend.ranking import encode_cases, score_candidates
from rankwise.recommend.synthetic import SyntheticSettings, synthetic_log
from rankwise.schema import ModelSettings
from rankwise.tokenise import AnswerCollator, encode_answer, padding_token, token_ids
from timing import interleaved, machine, peak_memory, ratio, seconds, spread, table

CASES, CANDIDATES, CONTEXT = 16, 20, 1024
WHOLE = "whole sequences, a case at a time"
# Of the prompt's cache, by the tokens of a batch: the default, and about as many as one case has as whole sequences.
SHARED = {"shared prompt": 16384, "shared prompt, small batches": 2048}
WAYS = (*SHARED, WHOLE)
Data = tuple[list[str], list[list[str]]]


def data(tokenizer: PreTrainedTokenizerBase, length: int) -> Data:
    """Prompts of about ``length`` tokens, each with candidates that it does not name."""
    generator = random.Random(0)
    titles: list[str] = synthetic_log(SyntheticSettings(users=1, series=12, singles=30))[1]["title"].to_list()
    prompts, answers = [], []
    for _ in range(CASES):
        shuffled = generator.sample(titles, len(titles))
        seen = [shuffled.pop()]
        while len(token_ids(tokenizer, [prompt(seen)])[0]) < length:
            seen.append(shuffled.pop())
        prompts.append(prompt(seen))
        answers.append([f" {title}" for title in shuffled[:CANDIDATES]])
    return prompts, answers


def prompt(seen: Sequence[str]) -> str:
    """The shipped template's words."""
    return f"I have seen these films: {'; '.join(seen)}. The next film I saw was"


@torch.no_grad()
def whole_sequences(model: nn.Module, tokenizer: PreTrainedTokenizerBase, given: Data) -> list[np.ndarray]:
    """One padded batch a case; logits of the answers' end of the rows only."""
    collate, scores = AnswerCollator.of(tokenizer), []
    for text, candidates in zip(*given, strict=True):
        rows = [encode_answer(tokenizer, text, candidate, CONTEXT) for candidate in candidates]
        values, _ = answer_log_probabilities(model, collate([row.features() for row in rows if row is not None]))
        scores.append(values.sum(dim=1).double().numpy())
    return scores


def work(way: str, length: int) -> Callable[[], list[np.ndarray]]:
    """The scoring of one way, ready to be called."""
    quiet_libraries()
    settings = ModelSettings()
    tokenizer, model = load_tokenizer(settings.path), load_language_model(settings).cpu().eval()
    given = data(tokenizer, length)
    if way == WHOLE:
        return lambda: whole_sequences(model, tokenizer, given)
    padding, tokens = padding_token(tokenizer), SHARED[way]
    return lambda: score_candidates(model, encode_cases(tokenizer, *given, CONTEXT)[0], padding, tokens)


def peak(way: str, length: int) -> float:
    """Mebibytes that scoring adds to this process's largest resident memory."""
    scoring = work(way, length)
    before = peak_memory()
    scoring()
    return peak_memory() - before


def peak_elsewhere(way: str, length: int) -> float:
    """The same in a new process."""
    words = [
        sys.executable,
        __file__,
        "--peak",
        way,
        "--lengths",
        str(length),
        "--threads",
        str(torch.get_num_threads()),
    ]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def compare(length: int, runs: int) -> list[list[str]]:
    """Rows of the table for one length of prompt."""
    scoring = {way: work(way, length) for way in WAYS}
    scores = [np.concatenate(scoring[way]()) for way in WAYS]
    found = interleaved({way: lambda one=one: seconds(one) for way, one in scoring.items()}, runs)  # type: ignore[misc]
    memory = {way: [peak_elsewhere(way, length) for _ in range(3)] for way in WAYS}
    return [
        [
            str(length),
            way,
            spread(found[way]),
            ratio(found[WHOLE], found[way]),
            f"{statistics.median(memory[way]):.0f} MiB",
            f"{np.abs(own - scores[-1]).max():.1e}",
        ]
        for way, own in zip(WAYS, scores, strict=True)
    ]


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7, help="of each way (%(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 300], help="tokens of a prompt, about")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--peak", choices=WAYS, help="print one way's memory only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(peak(arguments.peak, arguments.lengths[0]))
        return
    rows = [row for length in arguments.lengths for row in compare(length, arguments.runs)]
    print(machine(arguments.threads))
    print(f"{CASES} cases x {CANDIDATES} candidates; {arguments.runs} runs of each, in turns: median (least to most)\n")
    head = ["prompt tokens", "way", "seconds", "times as fast", "memory added", "largest difference"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
