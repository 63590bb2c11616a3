"""Tasks of an Encoder: classification, retrieval, probes and detection on image and text embeddings."""
