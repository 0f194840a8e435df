"""Folds a per-channel norm of the keys into the parameters in front of every attention of a graph."""
