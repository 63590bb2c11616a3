"""Tasks of a Matcher: which of several texts fits an image."""
