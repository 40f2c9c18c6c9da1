"""What a trained model has learned, as pictures and as the numbers behind them (ViT paper, figures 6, 7, 11, 14)."""
