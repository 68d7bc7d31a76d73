"""Scoring candidates after a shared prompt as one token tree, against other ways, and against writing one answer.

All ways but the writing give the same scores; the largest difference is in the table. Each measurement of memory is a
process of its own: the largest resident memory after scoring, less the largest once the model and the data were there
(Linux only).
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

from preference_ways import SHAPES
from rankwise.generation import generate_answers
from rankwise.likelihood import answer_log_probabilities
from rankwise.models import load_language_model, load_tokenizer, quiet_libraries
from rankwise.recommend.ranking import GENERATED, encode_cases, score_candidates, score_continued
from rankwise.recommend.synthetic import SyntheticSettings, synthetic_log
from rankwise.schema import ModelSettings
from rankwise.tokenise import AnswerCollator, encode_answer, padding_token, token_ids
from timing import interleaved, machine, peak_memory, ratio, seconds, spread, table

CASES, CANDIDATES, CONTEXT = 16, 20, 1024
SHIPPED = "shipped"
TREES, CACHE, WRITTEN = "a token tree", "the prompt's cache, continued", "one answer, written greedily"
WHOLE, FULL = "whole sequences, answers' logits", "whole sequences, all logits"
TREES_ALL, WRITTEN_ALL = "token trees, all cases together", "written greedily, all cases together"
WAYS = (TREES, CACHE, WHOLE, FULL, WRITTEN, TREES_ALL, WRITTEN_ALL)
TOGETHER = (TREES_ALL, WRITTEN_ALL)
SCORING = {TREES: score_candidates, TREES_ALL: score_candidates, CACHE: score_continued}
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
    """A padded batch of each case; logits of the answers' end of the rows only."""
    collate, scores = AnswerCollator.of(tokenizer), []
    for text, candidates in zip(*given, strict=True):
        rows = [encode_answer(tokenizer, text, candidate, CONTEXT) for candidate in candidates]
        values, _ = answer_log_probabilities(model, collate([row.features() for row in rows if row is not None]))
        scores.append(values.sum(dim=1).double().numpy())
    return scores


@torch.no_grad()
def all_logits(model: nn.Module, tokenizer: PreTrainedTokenizerBase, given: Data) -> list[np.ndarray]:
    """The same with the logits of all tokens, as published code computes them."""
    collate, scores = AnswerCollator.of(tokenizer), []
    for text, candidates in zip(*given, strict=True):
        rows = [encode_answer(tokenizer, text, candidate, CONTEXT) for candidate in candidates]
        batch = collate([row.features() for row in rows if row is not None])
        labels = batch.pop("labels")[:, 1:]
        logs = model(**batch).logits.float()[:, :-1].log_softmax(-1)
        values = logs.gather(2, labels.clamp(min=0)[:, :, None])[:, :, 0]
        scores.append((values * (labels >= 0)).sum(dim=1).double().numpy())
    return scores


def work(way: str, length: int, shape: str) -> Callable[[], list[np.ndarray]]:
    """The scoring of one way, ready to be called, a case at a time or all together; nothing comes back from writing."""
    quiet_libraries()
    settings = ModelSettings()
    tokenizer = load_tokenizer(settings.path)
    base = load_language_model(settings) if shape == SHIPPED else SHAPES[shape].base("cpu", "float32")
    model, given, padding = base.cpu().eval(), data(tokenizer, length), padding_token(tokenizer)
    if way in (WHOLE, FULL):
        scoring = whole_sequences if way == WHOLE else all_logits
        return lambda: scoring(model, tokenizer, given)
    cases, _ = encode_cases(tokenizer, *given, CONTEXT)
    parts = [cases] if way in TOGETHER else [[case] for case in cases]
    if way in (WRITTEN, WRITTEN_ALL):
        prompts = [[case.prompt for case in part] for part in parts]
        return lambda: [text for part in prompts for text in generate_answers(model, tokenizer, part, GENERATED)] and []
    scored = SCORING[way]
    return lambda: [scores for part in parts for scores in scored(model, part, padding)]


def peak(way: str, length: int, shape: str) -> float:
    """Mebibytes that scoring adds to this process's largest resident memory."""
    scoring = work(way, length, shape)
    before = peak_memory()
    scoring()
    return peak_memory() - before


def peak_elsewhere(way: str, length: int, shape: str) -> float:
    """The same in a new process."""
    options = {"peak": way, "lengths": length, "shape": shape, "threads": torch.get_num_threads()}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    return float(done.stdout)


def compare(length: int, shape: str, runs: int) -> list[list[str]]:
    """Rows of the table for one length of prompt."""
    scoring = {way: work(way, length, shape) for way in WAYS}
    found = interleaved({way: lambda one=one: seconds(one) for way, one in scoring.items()}, runs)  # type: ignore[misc]
    memory = {way: [peak_elsewhere(way, length, shape) for _ in range(3)] for way in WAYS}
    first = np.concatenate(scoring[TREES]())
    return [
        [
            str(length),
            way,
            spread([taken / CASES for taken in found[way]], digits=4),
            ratio(found[way], found[TREES]),
            f"{statistics.median(memory[way]):.0f} MiB",
            f"{np.abs(np.concatenate(scores) - first).max():.1e}" if (scores := scoring[way]()) else "",
        ]
        for way in WAYS
    ]


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7, help="of each way (%(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 300], help="tokens of a prompt, about")
    parser.add_argument("--shape", choices=(SHIPPED, *SHAPES), default=SHIPPED, help="of the model (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--peak", choices=WAYS, help="print one way's memory only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(peak(arguments.peak, arguments.lengths[0], arguments.shape))
        return
    rows = [row for length in arguments.lengths for row in compare(length, arguments.shape, arguments.runs)]
    print(machine(arguments.threads))
    print(f"{arguments.shape}; {CASES} cases x {CANDIDATES} candidates; {arguments.runs} runs in turns: median")
    print("(least to most)\n")
    head = ["prompt tokens", "way", "seconds a case", "times the tree's", "memory added", "largest difference"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
