"""Reproduce tables of the papers at laptop scale."""
