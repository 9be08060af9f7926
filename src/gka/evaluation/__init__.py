"""Evaluations: recall without training, associative recall (MQAR), long contexts, lm-evaluation-harness.

`gka recall` uses `recall` and `memories`; `gka mqar` uses `mqar` (the task), `mqar_cell` (one training)
and `mqar_sweep`; `gka evaluate` uses `context`; `gka lm-eval` uses `harness` and `harness_model`.
`repeats` splits a model's loss by what the text repeats; `gka reproduce` uses it.
"""
