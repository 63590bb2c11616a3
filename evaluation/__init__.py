"""Evaluation: tasks that measure encoders, answerers, matchers, generators and language models."""
