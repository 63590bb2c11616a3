"""A package by strangers, written from the contracts' docstrings alone: teachers, students, recipes, a loss, a task."""
