"""Gated KalmaNet."""
