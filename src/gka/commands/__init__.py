"""The command `gka`: one file per command, collected by `main`; `options` has what they share.

Settings of `gka train` and `gka prime` are declared in the run's configuration (`gka.training.settings`),
from which `runs` makes options. Slow imports are postponed until a command runs.
"""
