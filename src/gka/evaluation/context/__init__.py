"""Use of a long context: tasks made from local text at exact lengths, any causal model, two scores.

haystack          local text as tokens, prompts of exactly so many tokens
tasks, facts      the tasks by name
reader, scoring   a model reads in chunks; what its answers and predictions are worth
run, show         grids of cells, kept in one file; tables and pictures

The kinds of task are those of RULER (arXiv 2404.06654) and BABILong (arXiv 2406.10149); texts and
worlds are our own, so figures compare models with each other and not with those papers' tables.
"""
