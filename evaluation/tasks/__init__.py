"""Evaluation tasks: a folder for each kind of model, a file for each benchmark, and `registry` with their names."""
