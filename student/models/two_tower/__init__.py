"""Two-tower students: an image encoder and a text encoder (CLIP)."""
