"""Use a trained student as an Encoder, Answerer, Matcher or Generator of `evaluation`."""
