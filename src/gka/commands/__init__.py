"""The command `gka`: one file a command, `main` that puts them together, `options` that they share.

The options of `gka train` and `gka prime` that are settings of a run are declared in the run's configuration
(`gka.training.settings`); `runs` makes options of them. Heavy imports wait until a command runs.
"""
