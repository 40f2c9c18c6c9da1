"""Decide which image goes into which shard: a pure function of the rows and the settings, in a file."""
