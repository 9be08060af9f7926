"""Claims about the method as experiments that anybody can run: `gka reproduce`.

`experiment` says what an experiment is, `runner` runs one, `registry` has them by name; each of the other
files is one experiment or what several of them share.
"""
