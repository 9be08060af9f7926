"""Experiments about the quality of models and methods, not their speed.

Run one as `python -m gka.experiments.NAME`: `chain` (a Transformer primed into hybrids with equal budgets),
`combining` (the loss of combining separately read documents), `numerics` (the tables of docs/numerics.md) or
`conjugate` (conjugate gradients against the other solvers). Results go to a `gka.experiments.ledger.Ledger`.
"""
