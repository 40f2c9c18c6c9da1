"""Vision Transformers: shapes (without torch), layers, the model, its initial weights."""
