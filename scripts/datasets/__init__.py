"""Generate or download small data sets."""
