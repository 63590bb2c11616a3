"""A record of numbers: caches, losses, weights, exports; a change that is not numerical leaves it as it is."""
