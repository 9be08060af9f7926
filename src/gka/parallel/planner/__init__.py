"""Time, memory and exchanges of a training run before it starts, from a card's measured speed."""

from gka.parallel.planner.card import Card, card_names, read_card
from gka.parallel.planner.job import Job
from gka.parallel.planner.plan import Plan, make_plan

__all__ = ["make_plan", "Plan", "Job", "Card", "read_card", "card_names"]
