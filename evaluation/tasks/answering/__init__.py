"""Tasks of an Answerer: choose one of the answers to a question about an image."""
