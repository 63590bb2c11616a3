"""Evaluation data: published sets, class names, prompts, word orders."""
