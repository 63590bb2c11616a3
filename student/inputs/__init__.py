"""Turn a manifest and caches into training batches."""
