"""Find what is wrong with a shard set."""
