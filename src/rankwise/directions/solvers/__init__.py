"""How is a weight decomposed? One end of its spectrum alone where that can be checked, else all of it."""

from rankwise.directions.solvers.choice import Solution, Solver, decompose

__all__ = ["Solution", "Solver", "decompose"]
