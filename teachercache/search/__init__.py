"""Nearest-neighbour search over cached vectors with FAISS."""
