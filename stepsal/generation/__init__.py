"""Answers of a model: how they are written, what may end them, how likely they are, and what they cost.

`answers` puts questions to a model and returns traces; `loop` writes tokens after prompts, one forward pass for each;
`decoding` holds the settings, `sampling` draws a token, `endings` ends an answer or its thinking, `scoring` tells how
likely an answer was, and `flops` how many operations it took.
"""
