"""Recipes, one file for each paper, listed in `registry`."""
