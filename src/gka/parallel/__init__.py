"""Models over several devices. Collectives live here alone, and nothing below imports it."""

from gka.parallel.context import ContextParallel, even_ranges

__all__ = ["ContextParallel", "even_ranges"]
