"""Hold sentences with numbers, in README.md and in the notebooks, against the committed tables; no model is needed.

A statement is a piece of text with `{}` for each number that is checked and `{*}` for one that the tables do not hold,
and a function that computes the numbers. A number agrees when it is the computed one, rounded as the text writes it.
That the tables are what the notebooks make of the models is for `make nightly` to say.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nbformat
import published as p
import pytest

ROOT = Path(__file__).parents[2]
NUMBER = r"[+−-]?\d[\d,]*(?:\.\d+)?"
#: Float32 sums differ in the last digits between machines, so that a value at the edge may be rounded either way.
SLACK = 0.05
MODELS = ("mini", "smollm2")

Statements = list[tuple[str, Callable[[], p.Numbers]]]

README: Statements = [
    (
        "On {} other problems they make the right number likelier by {} nats ({} to {}), in words that nothing was "
        "chosen on by {} ({} to {}); the paper's band does nothing, random heads harm. But that strength, τ_max 0.5, "
        "loses results of the thinking, and free answers gain little: short recall {} points ({} to {}, n = {}; three "
        "sets of random heads {}, {} and {}), stories {} ({} to {}), restated facts {} in one wording (of fewer "
        "facts) and {} in the other.",
        p.guided_as_readme,
    ),
    (
        "in answers by {} points in recall ({} to {}) and {} in facts of one wording ({} to {}), not in stories ({}, "
        "{} to {})",
        lambda: [*p.on_hand_over("recall"), *p.on_hand_over("facts", "villages"), *p.on_hand_over("stories")],
    ),
    (
        "the question twice where facts are restated ({} and {}), which changes recall by {} and stories by {}.",
        p.question_twice,
    ),
    ("StepFlow makes mini worse ({} to {} points on four sets of problems", p.range_on_mini),
    ("in smollm2 no difference is seen ({}, {} to {})", lambda: p.change("smollm2: sums")),
    ("No band and no strength of {} helps mini.", lambda: p.best_setting()[:1]),
    (
        "Eight votes raise mini from {} to {} %",
        lambda: [p.votes("mini", "baseline"), p.votes("mini", "8 votes")],
    ),
    (
        "a planted optimum is found ({} points in the search, {} held out, {} to {})",
        lambda: [p.search("planted")[0], *p.held_out("planted")[:3]],
    ),
    (
        "In mini the best of {} settings gained {} points in the search and none on {} held-out problems "
        "({}, {} to {})",
        lambda: [p.n_settings("mini"), p.search("mini")[0], p.held_out("mini")[3], *p.held_out("mini")[:3]],
    ),
    (
        "in smollm2 none of {} gained anything, and the one that was left had {} ({} to {}) on {}.",
        lambda: [p.n_settings("smollm2"), *p.held_out("smollm2")],
    ),
    ("Lock-in and Decay as numbers, in {} traces", p.n_traces),
    (
        "four sets of chain problems (n = {} each, greedy) and sums (n = {})",
        lambda: [p.n_problems("mini-length-9"), p.n_sums()[1]],
    ),
    ("both swapped, both everywhere; n = {}", lambda: [p.provenance("bands_accuracy")["n_problems"]]),
    ("seven values of τ_max and of α; n = {}", lambda: [p.provenance("sensitivity")["n_problems"]]),
    ("{} million parameters, Qwen2 architecture", p.n_weights),
    ("64 answers of {} tokens on average, whose lengths are lognormal, come {} times as fast as", p.refilled_plain),
    ("16, and {} times under StepFlow", p.refilled_under_stepflow),
    ("A prompt of {} tokens takes {} s and adds {} GB; under StepFlow {} s and {} GB", p.long_prompt),
    ("takes {} ms, of which {} are ours, and {} ms more under StepFlow", p.milliseconds_of_python),
    ("maps of 2048 tokens take {} s, of 8192 {} s and of 32768 {} s, with {} GB beside", p.maps_on_a_gpu),
    ("That is {}, {} and {} times the fused pass at", p.maps_of_floor_on_a_gpu),
    ("exponent of {} between 1024 and 16384 tokens, and of {} from 2048 on", p.exponents),
    ("at its peak {}, {} and {} GB at 2048, 4096 and 8192 tokens, and {}, {} and {} GB", p.bytes_under_stepflow),
    *(
        (text, lambda n_tokens=n_tokens, method=method: p.time_under_stepflow(method, n_tokens))
        for text, n_tokens, method in (
            ("a map takes {} times ({} to {}, 3 turns) at the", 2048, "streamed StepFlow"),
            ("{} times ({} to {}) with every layer edited", 2048, "streamed StepFlow everywhere"),
            ("the turns were uneven, {} times ({} to {}) and", 1024, "streamed StepFlow"),
            ("{} times ({} to {}), and at 8192 tokens one run", 1024, "streamed StepFlow everywhere"),
        )
    ),
    ("one run of each, not in turn, gives {} and {} times", lambda: p.one_run_under_stepflow(8192)),
    (
        "a backward pass for each target, takes {} s at 128 tokens",
        lambda: p.pick(p.benchmark("saliency_memory"), "seconds", tokens=128),
    ),
    ("Pooling is {} to {} % of the time at 2048 tokens", p.pooling),
]

FLOW: Statements = [
    (
        "Of {} traces {*} are correct and {*} wrong; {} of the wrong ones have the regular number of steps",
        lambda: [p.provenance("fig2_flow_mean")["sampling_seeds"][1] + 1, p.provenance("fig2_flow_mean")["n"]["wrong"]],
    ),
    (
        "own and the previous step is {} in correct and {} in wrong traces, a difference of {}",
        lambda: p.both_outcomes("shallow"),
    ),
    (
        "the summary's share on the thinking is {} in correct and {} in wrong traces, {} (",
        lambda: p.both_outcomes("deep"),
    ),
]

FOUR_INTERVALS = " {} ({} to {}) |" * 4
OVER_BASELINE = "over_baseline over_low over_high"
PROFILES: Statements = [
    ("| Shallow Lock-in | yes |" + FOUR_INTERVALS, lambda: p.scalars("shallow_lock_in")),
    ("| Deep Decay | yes |" + FOUR_INTERVALS, lambda: p.scalars("deep_decay")),
    ("| fading with depth | in its maps |" + FOUR_INTERVALS, lambda: p.scalars("deep_fade")),
    ("| n correct, wrong (lock-in; decay) | |" + " {}, {}; {}, {} |" * 4, p.counts),
    ("whatever the outcome ({} and {})", p.local_share),
    ("The difference of {}, with p ≤ {},", lambda: p.scalar("mini", "shallow_lock_in", columns="difference p")),
    (
        "less of itself (p ≤ {}; {} of similar length",
        lambda: [p.scalar("mini", "deep_decay", f"all wrong{rest}", "p")[0] for rest in ("", ", similar length")],
    ),
    (
        "a wrong number after a sum shows none of it ({}, {} to {})",
        lambda: p.scalar("smollm2", "deep_fade", "wrong number"),
    ),
    ("show it most ({}, {} to {})", lambda: p.scalar("smollm2", "deep_fade", "no number at all")),
    (
        "alone lacks the number show some ({}, {} to {})",
        lambda: p.scalar("smollm2", "deep_fade", "number before the summary only"),
    ),
    ("answers that were cut off ({})", lambda: p.scalar("smollm2", "deep_decay", "truncated", "difference")),
    ("seven to twelve in mini ({} to {} in log10", p.analysis_block),
    ("an AUROC of {} ({} to {}), the mean", lambda: p.auroc("mini", "these together")),
    ("both together no more ({}, {} to {})", lambda: p.auroc("mini", "all of these", OVER_BASELINE)),
    ("length and log-probability reach {} ({} to {})", lambda: p.auroc("smollm2, all", "length and log-probability")),
    (
        "tell more than these and add {} ({} to {})",
        lambda: p.auroc("smollm2, with a summary", "all of these", OVER_BASELINE),
    ),
    (
        "correlation of a layer down to {}), nearly the same in smollm2 ({})",
        lambda: p.least_correlation("sequence"),
    ),
    ("Attention alone is further away ({}, {})", lambda: p.least_correlation("attention")),
]

SHALLOW, DEEP = (0, 1), (6, 7)
STEPFLOW: Statements = [
    ("share on the question rises from {} to {} %, in the deep ones it stays at {} %", p.long_trace),
    (
        "thinking row on the question rises from {} to {}",
        lambda: p.share_of_rows(p.TO_QUESTION, SHALLOW, p.PLAIN, p.AGAIN),
    ),
    (
        "that of the summary on the thinking from {} to {}",
        lambda: p.share_of_rows(p.TO_THINKING, SHALLOW, p.PLAIN, p.AGAIN),
    ),
    (
        "The deep layers hardly follow: {} to {}, and {} to {} ({} in the answers written anew)",
        lambda: [
            *p.share_of_rows(p.TO_QUESTION, DEEP, p.PLAIN, p.AGAIN),
            *p.share_of_rows(p.TO_THINKING, DEEP, p.PLAIN, p.AGAIN, p.ANEW),
        ],
    ),
    ("The bridge is raised in {} % of head rows", p.raised),
]

ACCURACY: Statements = [
    *[(f"| {task} | | {{}} ({{}} to {{}}) |", partial(p.change, task)) for task in (*p.MINI_TASKS, "smollm2: sums")],
    ("the interval allows for a gain of {} points", lambda: p.change("smollm2: sums", columns="high")),
    ("It has {} different sums among its {} problems", p.n_sums),
    (
        "(an effect of {} points can be excluded on each set)",
        lambda: [max(p.change(task, "SMI", "high")[0] for task in p.MINI_TASKS)],
    ),
    ("budget forcing hurts smollm2 ({}, {*} to {*})", lambda: [p.gain("smollm2", "wait")]),
    ("what it is least sure of ({} nats", lambda: p.effect("mini", "SMI", 0, "entropy")),
    ("and SMI moves it by {} nats", lambda: p.effect("smollm2", "SMI", 1, "kl")),
]

BANDS: Statements = [
    (
        "hurts there ({} points, {*} to {*}), no effect seen elsewhere ({} to {}, each",
        lambda: [
            p.setting_gain("OEB 0-1"),
            *sorted((p.setting_gain("OEB 2-3"), p.setting_gain("OEB 4-5"), p.setting_gain("OEB 6-7")))[::-2],
        ],
    ),
    ("| bands swapped | | {} (", lambda: [p.setting_gain("swapped")]),
    (
        "up to 0.05 no effect seen ({}, {*} to {*}); {} at the paper's 0.15",
        lambda: [p.setting_gain("tau_max 0.05"), p.setting_gain("tau_max 0.15")],
    ),
    ("the best of {} settings is {} points above the baseline, less than the {*} that {} problems", p.best_setting),
]

COMPUTE: Statements = [
    (
        "{} in operations, {} in time | {} in operations, {} in time",
        lambda: [p.ratio(model, "StepFlow", f"{what}_ratio") for model in MODELS for what in ("flops", "time")],
    ),
    (
        "| StepFlow, one answer | gains on all benchmarks | {} points ({*} to {*}) | {} ({*} to {*}) |",
        lambda: [p.gain(model, "StepFlow") for model in MODELS],
    ),
    (
        "| self-consistency, 4 votes | less than StepFlow with 2 |" + " {} ({*} to {*}), at {} times |" * 2,
        lambda: p.votes_and_cost("4 votes"),
    ),
    (
        "| StepFlow with 2 votes | better than 4 votes without |" + " {} ({*} to {*}), at {} times |" * 2,
        lambda: p.votes_and_cost("StepFlow, 2 votes"),
    ),
    (
        "| StepFlow − none, 2 votes each | | {} ({*} to {*}) | {} (",
        lambda: [p.gain(model, "StepFlow, 2 votes", "2 votes") for model in MODELS],
    ),
    (
        "Eight votes raise mini from {} to {} %",
        lambda: [p.votes("mini", "baseline"), p.votes("mini", "8 votes")],
    ),
]

ERRORS: Statements = [
    (
        "| easy | {} points (LiveCodeBench) | {} ({} to {}), 7 needed |",
        lambda: [*p.within("easy", "difference"), *p.within("7 needed")],
    ),
    (
        "| medium | {} | {} ({} to {}), 8 needed; {} ({} to {}) among",
        lambda: [*p.within("medium", "difference"), *p.within("8 needed"), *p.within("8, 14 not needed")],
    ),
    (
        "| hard | {} | {} ({} to {}), 9 needed |",
        lambda: [*p.within("hard", "difference"), *p.within("9 needed")],
    ),
    (
        "bookkeeping {} %, premises {} %, arithmetic and carry none of {} |",
        lambda: [p.share_of_fixed(p.BOOKKEEPING), p.share_of_fixed(["wrong premise"]), *p.errors(p.CARRY, "before")],
    ),
    ("the baseline solves {} %", lambda: p.within("9 needed", "baseline")),
    ("lose nothing that could be seen ({}, {} to {};", lambda: p.within("0 of 4")),
    (
        "all others lose {} to {} points",
        lambda: sorted(-p.within(group)[0] for group in ("1 or 2", "3 of 4", "4 of 4"))[::2],
    ),
    ("StepFlow makes {} wrong answers right and {} right ones wrong", p.errors),
    ("should help with, {} of {} come right ({} %", p.premises),
    ("and {} new ones are made", lambda: p.errors(["wrong premise"], "broken")),
    (
        "wrong arithmetic in {} answers, where the baseline has {}",
        lambda: p.errors(["wrong arithmetic"], "after before"),
    ),
]

RESULT = " {} (n = {}) | **{} ({} to {}), n = {}** |"
CALIBRATION: Statements = [
    (
        "| planted | the planted one of {} settings |" + RESULT.replace("{}", "{} points", 1),
        lambda: [p.n_settings("planted"), *p.search("planted"), *p.held_out("planted")],
    ),
    (
        "| mini, chain | OEB in 5–6 at 0.1, of {} |" + RESULT,
        lambda: [p.n_settings("mini"), *p.search("mini"), *p.held_out("mini")],
    ),
    (
        "| smollm2, sums | the paper's setting, of {} (tied with another) |" + RESULT,
        lambda: [p.n_settings("smollm2"), *p.search("smollm2"), *p.held_out("smollm2")],
    ),
    ("eight of mini's sixteen fell after {} problems", lambda: p.case("mini", "n", round="1")),
    ("({} wrong traces of {})", p.profiled),
]

VARIANTS = " {} ({} to {}) |" * 4
GUIDED: Statements = [
    (
        "gain {} points in recall ({} to {}) and nothing in stories ({}, {} to {})",
        lambda: [n for task in ("recall", "stories") for n in p.on_hand_over(task)],
    ),
    ('{} points more are right in "villages" ({} to {};', lambda: p.on_hand_over("facts", "villages")),
    (
        "| premise recall, n = {}, nats |" + VARIANTS + " {}, {}, {} |",
        lambda: p.guided("probes", probe="premise_recall", wording="boxes"),
    ),
    (
        "| in other words, n = {} |" + VARIANTS + " {}, {}, {} |",
        lambda: p.guided("probes", probe="premise_recall", wording="villages"),
    ),
    ("| hand-over, n = {} |" + VARIANTS + " {}, {}, {} |", lambda: p.guided("probes", probe="hand_over")),
    ("| summary recall, n = {} |" + VARIANTS + " {}, {}, {} |", lambda: p.guided("probes", probe="summary_recall")),
    (
        "| facts: boxes, n = {}, points |" + VARIANTS + " {}, {}, {} |",
        lambda: p.guided("answers", task="facts", wording="boxes"),
    ),
    (
        "| facts: villages, n = {} |" + VARIANTS + " {}, {}, {} |",
        lambda: p.guided("answers", task="facts", wording="villages"),
    ),
    ("| recall, n = {} |" + VARIANTS + " {}, {}, {} |", lambda: p.guided("answers", task="recall")),
    ("| stories, n = {} |" + VARIANTS + " {}, {}, {} |", lambda: p.guided("answers", task="stories")),
    (
        "gains {} points at length 9 ({} to {}; {} % without) and none at length 8 ({}, {} to {}; {} % without)",
        lambda: [
            number
            for length in (9, 8)
            for number in p.pick(
                p.figure("guided_mini"), "mean low high baseline", length=length, variant="guided (answer)"
            )
        ],
    ),
]

STATEMENTS = {  # README.md, and notebooks by their number
    "README": README, "02": FLOW, "03": PROFILES, "04": STEPFLOW, "05": ACCURACY, "06": BANDS, "07": COMPUTE,
    "08": ERRORS, "10": CALIBRATION, "12": GUIDED,
}  # fmt: skip
ALL = [(file, sentence, compute) for file, rows in STATEMENTS.items() for sentence, compute in rows]


@functools.cache
def prose(file: str) -> str:
    """Return the text of README.md, or of the notebook of a number, with white space as single spaces."""
    if file == "README":
        text = (ROOT / "README.md").read_text()
    else:
        (path,) = (ROOT / "notebooks").glob(f"{file}_*.ipynb")
        cells = nbformat.read(path, as_version=4).cells
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return " ".join(text.split())


def pattern(sentence: str) -> str:
    """Return the regular expression of a sentence: `{}` is a number to check, `{*}` any number."""
    pieces = re.split(r"(\{\*?\})", sentence)
    return "".join({"{}": f"({NUMBER})", "{*}": NUMBER}.get(piece, re.escape(piece)) for piece in pieces)


def agree(text: str, number: float) -> bool:
    """Tell whether a text is a number, rounded to as many digits as it has."""
    digits = len(text.partition(".")[2])
    return abs(float(text.replace("−", "-").replace(",", "")) - number) <= (0.5 + SLACK) * 10**-digits


@pytest.mark.parametrize(("file", "sentence", "compute"), ALL, ids=[f"{file}: {text[:50]}" for file, text, _ in ALL])
def test_the_numbers_of_a_sentence_are_those_of_the_tables(
    file: str, sentence: str, compute: Callable[[], p.Numbers]
) -> None:
    matches = re.findall(pattern(sentence), prose(file))
    assert len(matches) == 1, f"{file} says this {len(matches)} times"
    texts = [matches[0]] if isinstance(matches[0], str) else matches[0]
    numbers = list(compute())
    assert len(texts) == len(numbers)
    assert all(map(agree, texts, numbers)), f"{texts} are written, {numbers} are in the tables"


def test_a_wrong_number_would_be_seen() -> None:
    assert agree("−11.5", -11.54)
    assert not agree("−11.5", -11.6)
    assert not agree("+1.5", -1.5)
    assert re.findall(pattern("{} of {*} (n = {})"), "3 of 4 (n = 1,000)") == [("3", "1,000")]
