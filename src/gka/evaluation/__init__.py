"""What a memory holds: recall without training, and multi-query associative recall (MQAR).

`gka.evaluation.recall` and `.memories` are behind `gka recall`; `.mqar` (the task), `.mqar_cell`
(one training), `.mqar_sweep` behind `gka mqar`.
"""
