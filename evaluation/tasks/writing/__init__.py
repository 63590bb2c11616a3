"""Tasks of a Generator: write captions and free-form answers."""
