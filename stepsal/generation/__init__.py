"""Answers of a model: the decoding loop, what may end an answer, and what it costs."""
