"""Small models trained on top of a student to measure it."""
