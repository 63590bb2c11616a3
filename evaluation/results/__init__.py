"""Run tasks, collect results, draw tables and figures."""
