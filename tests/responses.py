"""Responses for property tests: everything that segmentation treats in its own way, in any order."""

from __future__ import annotations

from hypothesis import strategies as st

from stepsal.trace.formats import FORMATS, Format

FRAGMENTS = [
    "First, we look at the numbers.", "So x = 3.14 here.", "E.g. this one, i.e. that one.", "See Fig. 2 for it.", "Hm.",
    "Wait... maybe not.", "Is it true? Yes!", "1. Take ten.", "2. Double it.", "- a list item", "\n", "\n\n", " ", "  ",
    "\\[ a = b. \n C = d. \\]", "$$ x. Y $$", "\\( p. Q \\)", "```python\nx = 1. \n\nY = 2\n```", "\\begin{align} a. B",
    "\\end{align}", "<think>", "</think>", "</th", "<", "$", "`", "<|channel|>analysis<|message|>", "<|end|>",
    "<|channel|>final<|message|>", "<|return|>", "<|endoftext|>", "答案是三。", "然后呢？", "😀🎉", "שלום עולם.",
    "The answer is no. Then", "a", "Answer:", ".", '"Quoted." ', "<|start|>assistant", "<|channel|>commentary to=f.g",
    "<|channel|>", "<|message|>", " <|constrain|>json", "final", "<|call|>", "[THINK]", "[/THINK]", "◁think▷",
    "◁/think▷", "<answer>", "~~~", "````\n", "\n```\n", "यह तीन है।", "كم هو؟", "Answer: \n",
]  # fmt: skip
TEXTS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=6)), max_size=25).map("".join)
ALL_FORMATS = [*FORMATS.values(), *map(Format.with_marker, ("Answer:", "Answer: \n", "\nAnswer:"))]
