"""Data for evaluation: readers of published sets, class names, prompts, wrong word orders, splits."""
