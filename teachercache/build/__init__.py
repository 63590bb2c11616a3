"""`tc build`: run a teacher over the rows that a cache is missing, and verify the result."""
