"""What a shard set holds, and how well it is shuffled."""
