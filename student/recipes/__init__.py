"""Recipes: one paper, one file, listed in `registry`."""
