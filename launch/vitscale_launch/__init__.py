"""Launching runs on a cluster. Imports without torch, so that it works on a login node."""
