"""Train a student: prepare, step, engine, checkpoints, loop."""
