"""Which directions? Singular subspaces of a weight, and adapters that start from them."""

from rankwise.directions.loading import load_checkpoint
from rankwise.directions.milora import MiloraConfig
from rankwise.directions.streaming import InitReport, initialise
from rankwise.directions.triplets import Part, Triplets, largest_triplets, smallest_triplets, triplets

__all__ = [
    "InitReport",
    "MiloraConfig",
    "Part",
    "Triplets",
    "initialise",
    "largest_triplets",
    "load_checkpoint",
    "smallest_triplets",
    "triplets",
]
