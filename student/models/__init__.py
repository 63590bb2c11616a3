"""The models that can be trained: one folder per family, and a registry of the families."""
