"""Reproduce the papers' tables at laptop scale."""
