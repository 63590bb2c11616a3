"""Nearest-neighbor search over cached vectors with FAISS."""
