"""Many answers to one prompt in one pass: token trees, packed into rows, with a mask that keeps paths apart."""

from rankwise.trees.batch import TreeBatch, batch_trees
from rankwise.trees.build import TokenTree, token_tree
from rankwise.trees.scoring import answer_log_probabilities_of, tree_log_probabilities
from rankwise.trees.support import why_no_trees

__all__ = [
    "TokenTree",
    "TreeBatch",
    "answer_log_probabilities_of",
    "batch_trees",
    "token_tree",
    "tree_log_probabilities",
    "why_no_trees",
]
