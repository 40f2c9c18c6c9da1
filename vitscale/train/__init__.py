"""The training run. Read loop.py first."""
