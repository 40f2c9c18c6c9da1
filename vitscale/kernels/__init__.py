"""Compute kernels: one function each, several backends, one of them plain arithmetic."""
