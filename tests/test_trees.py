from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from rankwise.errors import UserError
from rankwise.trees import TokenTree, batch_trees, token_tree
from rankwise.trees.masks import additive_mask, block_mask, dense_mask
from rankwise.trees.packing import pack
from tiny_trees import ROWS, Row, rows_of


def sequences(tree: TokenTree, row: Row) -> list[tuple[int, ...]]:
    """Of each node, the tokens from the prompt's first to its own, as the paths of the answers pass it."""
    prompt, answers = row
    found: dict[int, set[tuple[int, ...]]] = {place: {tuple(prompt[: place + 1])} for place in range(len(prompt))}
    for answer, path in zip(answers, tree.paths, strict=True):
        for place, edge in enumerate(path):
            found.setdefault(tree.sources[edge], set()).add((*prompt, *answer[:place]))
    assert sorted(found) == list(range(len(tree)))
    assert all(len(passed) == 1 for passed in found.values())
    return [found[node].pop() for node in range(len(tree))]


def begins(long: tuple[int, ...], short: tuple[int, ...]) -> bool:
    return long[: len(short)] == short


@settings(deadline=None)
@given(rows_of(tokens=2))
def test_a_tree_has_each_beginning_once(row: Row) -> None:
    prompt, answers = row
    tree = token_tree(prompt, answers)
    assert [[tree.targets[edge] for edge in path] for path in tree.paths] == answers
    nodes = sequences(tree, row)
    assert tree.tokens == [node[-1] for node in nodes]
    assert tree.depths == [len(node) - 1 for node in nodes]
    # No node twice, none that nothing is predicted from.
    beginnings = {(*prompt, *answer[:place]) for answer in answers for place in range(len(answer))}
    assert len(tree) == len(prompt) - 1 + len(beginnings)
    edges = list(zip(tree.sources, tree.targets, strict=True))
    assert (
        len(set(edges)) == len(edges) == len({tuple(answer[: p + 1]) for answer in answers for p in range(len(answer))})
    )
    assert tree.longest == len(prompt) + max(map(len, answers)) - 1


@settings(deadline=None)
@given(rows_of(tokens=2))
def test_a_node_sees_those_on_its_path(row: Row) -> None:
    tree = token_tree(*row)
    nodes = sequences(tree, row)
    for key, query in itertools.product(range(len(tree)), repeat=2):
        assert (key <= query < tree.ends[key]) == begins(nodes[query], nodes[key])


def test_a_small_tree_by_hand() -> None:
    """Prompt 1 2, answers 3 4 5, 3 4, 3 6 and 7: nodes 1, 2, 3 and, below 3, 4; 5, 6 and 7 only end something."""
    tree = token_tree([1, 2], [[7], [3, 4, 5], [3, 6], [3, 4]])
    assert (tree.tokens, tree.depths, tree.ends) == ([1, 2, 3, 4], [0, 1, 2, 3], [4, 4, 4, 4])
    assert list(zip(tree.sources, tree.targets, strict=True)) == [(1, 3), (2, 4), (3, 5), (2, 6), (1, 7)]
    assert tree.paths == [[4], [0, 1, 2], [0, 3], [0, 1]]


@pytest.mark.parametrize(
    ("prompt", "answers", "message"),
    [
        ([], [[1]], "a token tree needs a prompt of at least one token: an answer's first is predicted from it"),
        ([1], [], "a token tree needs answers of at least one token each, and there is none"),
        ([1], [[2], [], []], "a token tree needs answers of at least one token each, and answer 1 is empty"),
    ],
)
def test_nothing_to_predict_is_refused(prompt: list[int], answers: list[list[int]], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        token_tree(prompt, answers)


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=30), st.integers(1, 25))
def test_packing_places_all_once_and_wastes_no_row(lengths: list[int], width: int) -> None:
    rows = pack(lengths, width)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    used = [sum(lengths[index] for index in row) for row in rows]
    assert all(total <= width or len(row) == 1 for total, row in zip(used, rows, strict=True))
    assert all(one + other > width for one, other in itertools.combinations(used, 2))
    opened = [lengths[row[0]] for row in rows]
    assert opened == sorted(opened, reverse=True)


@settings(deadline=None, max_examples=50)
@given(st.lists(rows_of(tokens=2), min_size=1, max_size=4), st.sampled_from([None, 1, 16, 40]), st.sampled_from([1, 8]))
def test_a_batch_holds_its_trees(rows: list[Row], tokens_per_row: int | None, multiple_of: int) -> None:
    """Every answer is found again from the tensors alone: from where it is read, back to its tree's root."""
    trees = [token_tree(*row) for row in rows]
    batch = batch_trees(trees, 99, tokens_per_row, multiple_of)
    width = batch.input_ids.shape[1]
    longest = -(-max(map(len, trees)) // multiple_of) * multiple_of
    assert width % multiple_of == 0
    assert width <= max(longest, tokens_per_row or 0)
    assert int((batch.input_ids != 99).sum()) == sum(map(len, trees))
    assert batch.exists.sum(dim=1).tolist() == [len(answers) for _, answers in rows]
    sees, flat = dense_mask(batch.ends)[:, 0], batch.reads
    assert flat.tolist() == sorted(set(flat.tolist()))
    for number, (prompt, answers) in enumerate(rows):
        for place, answer in enumerate(answers):
            edges = batch.paths[number, place][: len(answer)]
            assert (batch.paths[number, place][len(answer) :] == len(batch.edge_tokens)).all()
            assert batch.edge_tokens[edges].tolist() == answer
            for step, read in enumerate(flat[batch.edge_reads[edges]].tolist()):
                seen = sees[read // width, read % width]
                assert batch.input_ids[read // width][seen].tolist() == prompt + answer[:step]
                assert batch.position_ids[read // width][seen].tolist() == list(range(len(prompt) + step))


def test_rows_are_as_wide_as_asked_and_no_wider() -> None:
    trees = [token_tree([1] * 10, [[2]])] * 3
    shapes = {asked: batch_trees(trees, 0, asked).input_ids.shape for asked in (None, 5, 31, 32, 200)}
    assert shapes == {None: (3, 16), 5: (3, 16), 31: (3, 16), 32: (1, 32), 200: (1, 32)}


def test_filling_is_seen_by_itself_alone() -> None:
    batch = batch_trees([token_tree([1, 2], [[3]])], padding=0, multiple_of=4)
    assert batch.input_ids.tolist() == [[1, 2, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 0]]
    assert dense_mask(batch.ends).int().tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]]


def test_a_batch_moves_as_a_whole() -> None:
    moved = batch_trees([token_tree(*row) for row in ROWS], padding=0).to("meta")
    assert {value.device.type for value in vars(moved).values()} == {"meta"}


@settings(deadline=None, max_examples=20)
@given(st.lists(rows_of(tokens=2), min_size=1, max_size=4), st.sampled_from([None, 40]))
def test_all_masks_say_the_same(rows: list[Row], tokens_per_row: int | None) -> None:
    ends = batch_trees([token_tree(*row) for row in rows], 0, tokens_per_row).ends
    expected = torch.zeros(ends.shape[0], 1, ends.shape[1], ends.shape[1], dtype=torch.bool)
    for row, query, key in itertools.product(*map(range, (*ends.shape, ends.shape[1]))):
        expected[row, 0, query, key] = key <= query < int(ends[row, key])
    assert torch.equal(dense_mask(ends), expected)
    for dtype in (torch.float32, torch.bfloat16):
        added = additive_mask(dense_mask(ends), dtype)
        assert added.dtype == dtype
        assert torch.equal(added == 0, expected)
        assert (added[~expected] == torch.finfo(dtype).min).all()
    made = block_mask(ends)
    assert made.shape == expected.shape
    assert torch.equal(create_mask(made.mask_mod, len(ends), 1, *made.shape[-2:], device="cpu"), expected)


def test_blocks_that_nobody_sees_are_skipped() -> None:
    """A prompt of 128 tokens and two answers that fill a block each: the second does not see the first's."""
    answers = [[place] * 129 for place in (1, 2)]
    ends = batch_trees([token_tree([3] * 128, answers)], padding=0, multiple_of=128).ends
    made = block_mask(ends)
    assert made.to_dense()[0, 0].tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    assert made.full_kv_num_blocks[0, 0].tolist() == [0, 1, 1]
