"""Single-stream students: one transformer over words and image regions."""
