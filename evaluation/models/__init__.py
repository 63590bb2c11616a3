"""Contracts of the models that tasks measure, and adapters: Encoder, Answerer, Matcher, Generator, LanguageModel."""
