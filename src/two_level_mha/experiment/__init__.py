"""The experiment of the method: a model, its layouts on ranks, and what they cost."""
