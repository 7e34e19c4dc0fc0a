"""Answers of a model: writing them, their likelihood, and their cost.

Call `stepsal.generate` for one answer and `stepsal.generate_batch` for several; both return traces. Their settings as
one value are a `stepsal.Decoding`, which `stepsal.collect`, `stepsal.evaluate` and `stepsal.calibrate` take.

Files: `answers` (questions to traces), `loop` (tokens after prompts, one forward pass for each), `decoding` (the
settings), `sampling` (the choice of a token), `endings` (ends of answers and of thinking), `scoring` (log-probabilities
of a trace), `flops` (operations of an answer).
"""
