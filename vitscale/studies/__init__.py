"""Many trainings and evaluations that answer one question: does a model transfer, how much data does it need."""
