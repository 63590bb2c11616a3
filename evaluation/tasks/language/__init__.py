"""Tasks of a language model: fine-tuning and infilling on text alone."""
