"""Whole experiments: what a model or a method is worth, not how fast it is.

Each is a module that runs as `python -m gka.experiments.NAME`: `chain` (a Transformer primed into hybrids
with equal budgets), `combining` (what is lost where documents are read apart), `numerics` (the tables of
docs/numerics.md). They keep what they found in a `gka.experiments.ledger.Ledger`.
"""
