"""One word for one thing: none of the words that CHANGELOG.md calls old is left in code, texts and tests."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
MAY_SAY_OLD_WORDS = ("tests/repository/test_vocabulary.py", "tests/repository/test_migration.py", "scripts/migrate.py")
#: Tests that show how an old word is refused, and the words.
REFUSALS = {
    "tests/test_layers.py": {'"bottom-quarter"', '"top-quarter"'},
    "tests/intervention/test_config.py": {'"bottom-quarter"', "oeb_layers=None"},
    "tests/harness/test_harness_arguments.py": {"oeb_layers=None"},
    "tests/maps/test_maps.py": {'reduce="mean"'},
    "tests/saliency/test_saliency.py": {"layers=None", '"bottom-quarter"'},
}
#: What no local name may be: a name is a noun for what it holds. "left" is one beside "right".
NO_NAMES = {"found", "there", "wanted", "left", "given", "now", "some"}

CALLED_WITH = r"\b(?:{})\((?:[^()]|\([^()]*\))*?\b(?:{})\s*="
"""A call or signature with a keyword; keywords of calls inside it do not count."""
#: Each old word of the table, and how it would be written; words that mean other things too with what is around them.
PATTERNS = {
    'StepFlowConfig.preset("qwq-32b")': r"preset\(\"(?:qwq|gpt-oss|qwen3|deepseek)",
    "layers=None": r"(?<![\w.])layers\s*(?::[^=,()]*)?=\s*None",
    '"bottom-quarter"': r"\bbottom-quarter\b",
    '"top-quarter"': r"\btop-quarter\b",
    '"bottom-half"': r"\bbottom-half\b",
    '"top-half"': r"\btop-half\b",
    "oeb_layers=None": r"\boeb_layers\s*(?::[^=,()]*)?=\s*None",
    "smi_layers=None": r"\bsmi_layers\s*(?::[^=,()]*)?=\s*None",
    'band_layers("deep", n_layers)': r"\bband_layers\b",
    'saliency.band("deep")': r"\w\.band\(",
    "plots.step_map(saliency, layer=5)": CALLED_WITH.format("step_map|token_map|flow_arcs", "layer"),
    'Trace.from_text(..., split="line")': CALLED_WITH.format(
        "from_text|from_tokens|generate|generate_batch|collect|evaluate|calibrate|stepflow", "format|split|min_chars"
    ),
    'StepFlowConfig(split="line")': CALLED_WITH.format("StepFlowConfig", "format|split|min_chars"),
    'collect(..., segmentation={"split": "line"})': r"\bsegmentation=(?:\{['\"]|\{\}|dict)",
    'collect(..., saliency={"target": "sequence"})': CALLED_WITH.format("collect", "saliency"),
    "Trace.check_segmentation(...)": r"\bcheck_segmentation\b",
    "evaluate(..., temperature=0.6)": CALLED_WITH.format(
        "collect|evaluate|calibrate|StepFlowPanel", "temperature|top_p|max_new_tokens|stop"
    ),
    "generate(..., put_off=1)": r"\bput_off\b",
    'Variant("wait", wait=1)': CALLED_WITH.format("Variant", "wait") + r"|\bwait:\s*int",
    'Variant("longer", budget=440)': r"\bbudget=(?!=)|\bbudget:\s*int|\w\.budget\b|\[[\"']budget[\"']\]",
    "calibrate(..., budget=800)": CALLED_WITH.format("calibrate", "budget"),
    "collect(..., n=100)": CALLED_WITH.format("collect", "n"),
    "collect(..., part_size=64)": r"\bpart_size\b",
    'reduce="mean"': r"\breduce[\"']?\s*(?:==?|!=|:)\s*[\"']mean\b",
    'reduce="sum"': r"\breduce[\"']?\s*(?:==?|!=|:)\s*[\"']sum\b",
    "saliency.model": r"\bsaliency\.model\b",
    'manifest["model"]': r"\bmanifest\[[\"']model[\"']\]",
    'plots.layer_profile(..., label="outcome")': CALLED_WITH.format("layer_profile", "label"),
    'plots.forest(..., label="variant")': CALLED_WITH.format("forest", "label"),
    "Population.open(folder)": r"\b(?:Population|Evaluation|Calibration|StepSaliency|Store)\.open\b",
    'calibration.save("preset.json")': r"\bcalibration\w*(?:\[[^]]*\])?\.save\([^()]*\.json",
    "population.traces": r"(?i:\bpopulation)\w*(?:\[[^]]*\])?\.traces\b",
    "traces.parquet": r"\btraces\.parquet\b",
    'answers["way"]': r"[\"']way[\"']",
    "variant.way": r"\w\.way\b",
    'evaluation.given("StepFlow")': r"\w(?<!hypothesis)\.given\(",
    "verdict.answer": r"\bverdict\w*(?:\[[^]]*\])?\.answer\b|" + CALLED_WITH.format("Verdict", "answer"),
    "verdict.answer_correct": r"\bverdict\w*\.answer_correct\b",
    '"answer_correct"': r"\banswer_correct\b",
    **{  # the name of a class in quotes says in a file what it holds
        f"stepsal.{name}": rf"(?<![\"'])\bstepsal\.{name}\b"
        for name in ("Population", "Evaluation", "Calibration", "Step", "Footprint", "memory_needed")
    },
    **{
        f"stepsal.{module}": rf"\bstepsal[./]{module}\b|\bfrom stepsal import [^\n]*\b{module}\b"
        for module in """
            accuracy figures population evaluation calibration proposals segment tracking pooling effects flops
            footprint devices ticks versions notebook
        """.split()
    },
    "stepsal figures 05": r"\bstepsal figures\b",
}


def table() -> dict[str, str]:
    """Read old -> new from CHANGELOG.md."""
    lines = (ROOT / "CHANGELOG.md").read_text().partition("| old | new |\n|---|---|\n")[2].splitlines()
    rows = [re.fullmatch(r"\| `(.+)` \| `(.+)` \|", line) for line in lines if line]
    assert all(rows)
    return dict(row.groups() for row in rows if row)


def texts() -> Iterator[tuple[str, str]]:
    """Yield the name and the text of every file that is to speak the vocabulary; of notebooks the sources alone."""
    for pattern in (
        "README.md", "Makefile", "stepsal/**/*.py", "stepsal/**/*.pyi", "stepsal/**/*.js", "scripts/*.py",
        "benchmarks/*.py", "examples/*.*", "tests/**/*.py",
    ):  # fmt: skip
        for path in sorted(ROOT.glob(pattern)):
            if (name := path.relative_to(ROOT).as_posix()) not in MAY_SAY_OLD_WORDS:
                yield name, path.read_text()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        yield path.name, "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)


def test_the_table_and_the_patterns_name_the_same_words() -> None:
    assert table().keys() == PATTERNS.keys()


@pytest.mark.parametrize("old", PATTERNS)
def test_a_pattern_knows_the_old_word_and_lets_the_new_one_pass(old: str) -> None:
    assert re.search(PATTERNS[old], old)
    assert not re.search(PATTERNS[old], table()[old])


@pytest.mark.parametrize("old", PATTERNS)
def test_no_old_word_is_left(old: str) -> None:
    hits = [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0][-60:]}"
        for name, text in texts()
        if old not in REFUSALS.get(name, ())
        for match in re.finditer(PATTERNS[old], text)
    ]
    assert not hits, f"{old} is now {table()[old]}:\n" + "\n".join(hits)


@pytest.mark.parametrize("new", sorted({new for new in table().values() if re.fullmatch(r"stepsal(\.\w+)+", new)}))
def test_the_new_names_exist(new: str) -> None:
    module, _, name = new.rpartition(".")
    assert hasattr(importlib.import_module(module), name) or importlib.import_module(new)


def local_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every name that is bound: variables, arguments, and names of comprehensions, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        if isinstance(node, ast.arg):
            yield node.arg, node.lineno


@pytest.mark.parametrize("folder", ["stepsal", "scripts", "benchmarks", "examples"])
def test_local_names_are_nouns(folder: str) -> None:
    hits = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        names = dict(local_names(ast.parse(path.read_text())))
        banned = NO_NAMES - {"left"} if "right" in names else NO_NAMES
        hits += [f"{path.relative_to(ROOT)}:{names[name]}: {name}" for name in banned & names.keys()]
    assert not hits, "name what it holds:\n" + "\n".join(hits)
