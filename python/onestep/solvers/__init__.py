"""Solvers of whole problems: torch tensors in, solutions out. Estimators and training call them."""
