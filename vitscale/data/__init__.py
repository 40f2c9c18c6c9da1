"""From tar shards to batches: manifest, order, stream, decode, transforms, loader."""
