"""How good a model is: held-out accuracy and few-shot transfer. Imports nothing of the training loop."""
