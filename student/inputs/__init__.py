"""From a manifest and caches to training batches."""
