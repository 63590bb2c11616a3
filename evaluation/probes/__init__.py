"""Small models that are trained on top of a frozen model to measure it."""
