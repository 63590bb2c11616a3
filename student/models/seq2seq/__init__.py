"""Sequence-to-sequence students: BART with a visual prefix."""
