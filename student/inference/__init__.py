"""A trained student as Encoder, Answerer, Matcher or Generator."""
