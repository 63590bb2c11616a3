"""Studies that papers report beside their metrics."""
