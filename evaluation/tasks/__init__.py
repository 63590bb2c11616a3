"""Tasks: one file per benchmark, listed in `registry`."""
