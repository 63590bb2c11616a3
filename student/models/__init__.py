"""Students: the contract, the registry, and one folder per family."""
