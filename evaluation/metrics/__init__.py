"""Metrics: arrays or texts in, numbers out."""
