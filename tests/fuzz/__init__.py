"""Random calls of every op and layer against float64, token by token: `python -m tests.fuzz`."""
