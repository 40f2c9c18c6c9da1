"""Find images that a dataset shares with held-out test sets, and copies within it."""
