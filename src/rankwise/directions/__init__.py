"""Which directions? Singular subspaces of a weight, and adapters that start from them."""

from rankwise.directions.initialise import InitReport, initialise
from rankwise.directions.milora import MiloraConfig
from rankwise.directions.triplets import Part, Triplets, largest_triplets, smallest_triplets, triplets

__all__ = [
    "InitReport",
    "MiloraConfig",
    "Part",
    "Triplets",
    "initialise",
    "largest_triplets",
    "smallest_triplets",
    "triplets",
]
