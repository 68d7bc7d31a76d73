"""Many answers to one prompt in one pass: token trees, packed into rows, with a mask that keeps paths apart."""

from rankwise.trees.batch import TreeBatch, batch_trees
from rankwise.trees.build import TokenTree, token_tree
from rankwise.trees.catalogue import catalogue_scores, score_catalogue
from rankwise.trees.constraint import CatalogueConstraint
from rankwise.trees.frontier import TopAnswers
from rankwise.trees.scoring import answer_log_probabilities_of, tree_log_probabilities
from rankwise.trees.search import top_answers
from rankwise.trees.support import why_no_trees
from rankwise.trees.trie import CatalogueTrie

__all__ = [
    "CatalogueConstraint",
    "CatalogueTrie",
    "TokenTree",
    "TopAnswers",
    "TreeBatch",
    "answer_log_probabilities_of",
    "batch_trees",
    "catalogue_scores",
    "score_catalogue",
    "token_tree",
    "top_answers",
    "tree_log_probabilities",
    "why_no_trees",
]
