"""How a model is trained, from text to its card."""
