"""Make or fetch small data sets."""
