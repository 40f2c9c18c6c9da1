"""Durable checkpoints: what is saved (state, fragments) and how it becomes visible (store)."""
