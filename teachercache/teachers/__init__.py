"""Frozen teachers: the contract, the registry, and one file or folder per kind of teacher."""
