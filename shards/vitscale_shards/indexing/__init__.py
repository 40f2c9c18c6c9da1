"""Make a foreign WebDataset set ours, without touching a tar."""
