"""Models over several devices: collectives live here and nowhere else, and nothing below imports this package."""

from gka.parallel.context import ContextParallel, even_ranges

__all__ = ["ContextParallel", "even_ranges"]
