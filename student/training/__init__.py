"""Train a student: preparation, steps, engine, checkpoints and the loop."""
