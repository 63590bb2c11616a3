"""What can be measured: Encoder, Answerer, Matcher, Generator."""
