"""Use of a long context: tasks from local text at exact lengths, for any causal model, with two scores.

haystack          local text as tokens, prompts of an exact number of tokens
tasks, facts      the tasks by name
reader, scoring   reading in chunks; scores of answers and predictions
run, show         grids of cells in one result file; tables and pictures

The kinds of task are those of RULER (arXiv 2404.06654) and BABILong (arXiv 2406.10149). Texts and
worlds are our own: figures compare models with each other, not with those papers' tables.
"""
