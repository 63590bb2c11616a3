"""The cache on disk: specification, layout, store, leases, repair."""
