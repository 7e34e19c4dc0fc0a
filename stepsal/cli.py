"""The command line: `stepsal trace` answers a question and maps the answer, `stepsal demo` shows how that looks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

if TYPE_CHECKING:
    from stepsal.layers import Band
    from stepsal.maps import StepSaliency
    from stepsal.trace import Trace

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
console = Console()

ROLE_STYLES = {"question": "bold blue", "thinking": "default", "summary": "bold green"}
DEMO_SEED, DEMO_LENGTH = 3, 5  # of the problem that `stepsal demo` asks
BANDS: tuple[Band, ...] = ("shallow", "deep")  # of layers, in the picture

HOW_TO_READ = (
    "Each row is a step, each column a step before it: the darker a cell, the more the row's step draws on the "
    "column's. First layers on the left, last ones on the right."
)
SMOLLM2 = 'stepsal trace --model smollm2 --html "A pen costs 3 euros. What do 4 pens cost?"'
LEAST_SHARE = 1e-3  # of a row, at which the colours of the picture begin

Target = Literal["token", "logit", "sequence"]
"""As `stepsal.maps.step_saliency.GradientTarget`, which takes seconds to import, and --help would wait for it."""


@app.callback()
def main() -> None:
    """See how information flows between the steps of a reasoning model's trace. Begin with `stepsal demo`."""


@app.command()
def trace(
    question: Annotated[
        str, typer.Argument(help="What to ask. **mini** knows chains alone, as in the example; **smollm2** anything.")
    ],
    model: Annotated[str, typer.Option(help="**mini**, **smollm2**, a hub id or a local folder.")] = "mini",
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write OUT.safetensors (the maps), OUT.png.", show_default="trace, or trace-2, ..."),
    ] = None,
    html: Annotated[bool, typer.Option("--html", help="Write a page to explore, too: OUT.html.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of an earlier run.")] = False,
    target: Annotated[
        Target,
        typer.Option(help="**token**: loss of each next token; **logit**: its logit; **sequence**: sum of the losses."),
    ] = "token",
    stepflow: Annotated[bool, typer.Option("--stepflow", help="Write and map the answer under StepFlow.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Limit of the answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Answer a question, print the answer step by step, and write its step maps and a picture of them.

    The picture shows the shallow and the deep quarter of the layers; the maps of all layers are in OUT.safetensors,
    to be read with `stepsal.StepSaliency.load`.

    Examples: `stepsal trace "Hugo is 4 plus 3. Anna is Hugo plus 9. What is Anna?"`,
    `stepsal trace --model smollm2 --html "A pen costs 3 euros. What do 4 pens cost?"`
    """
    outputs = Outputs.at(out, "trace", html=html, overwrite=overwrite)
    decoding = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    with _errors_in_a_line():
        answer, saliency = _answer(question, model, target=target, stepflow=stepflow, decoding=decoding)
    with _errors_in_a_line():
        outputs.write(answer, saliency)
    _say_what_next(outputs, saliency.model_name)


@app.command()
def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write: OUT.safetensors, OUT.png, OUT.html.", show_default="demo, or demo-2, ..."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files of an earlier run.")] = False,
) -> None:
    """Let the embedded reasoner answer a problem, and show what stepsal makes of it; takes half a minute and no hub."""
    outputs = Outputs.at(out, "demo", html=True, overwrite=overwrite)
    with _errors_in_a_line():
        from stepsal.tasks import chain

        problem = chain.sample(DEMO_SEED, DEMO_LENGTH)
        console.print("The embedded reasoner (1.2 million parameters) answers a problem of its task, step by step:\n")
        answer, saliency = _answer(problem.question, "mini", target="token", stepflow=False, decoding={})
    verdict = problem.grade(answer)
    style = "bold green" if verdict.correct else "bold red"
    console.print(Text(f"{'correct' if verdict.correct else 'wrong'}: {verdict.reason}", style=style))
    with _errors_in_a_line():
        outputs.write(answer, saliency)
    _say_what_next(outputs, saliency.model_name)


@dataclass(frozen=True)
class Outputs:
    """The files that a run writes.

    Attributes:
        maps: the maps of all layers.
        picture: two of their bands as a picture.
        page: the maps as a page to explore; None where none is written.
    """

    maps: Path
    picture: Path
    page: Path | None

    @classmethod
    def at(cls, out: Path | None, default: str, *, html: bool, overwrite: bool) -> Outputs:
        """Return the files of a run, before any work is done; files of an earlier run are not replaced unasked.

        Args:
            out: path without a suffix; None takes the default, with a number behind it where that is taken.
            default: the name that is taken without `out`.
            html: True writes a page, too.
            overwrite: True replaces what is there.

        Raises:
            typer.BadParameter: the folder does not exist, or one of the files does.
        """
        names = iter([out]) if out is not None else (Path(default + (f"-{n}" if n > 1 else "")) for n in count(1))
        for name in names:
            suffixes = (".safetensors", ".png", *([".html"] if html else []))
            paths = [name.with_name(name.name + suffix) for suffix in suffixes]
            taken = [path for path in paths if path.exists()]
            if overwrite or not taken:
                break
        if not name.resolve().parent.is_dir():
            raise typer.BadParameter(f"the folder {name.resolve().parent} does not exist", param_hint="--out")
        if taken and not overwrite:
            raise typer.BadParameter(
                f"{taken[0]} is there from an earlier run: give another name, or --overwrite", param_hint="--out"
            )
        return cls(paths[0], paths[1], paths[2] if html else None)

    def write(self, answer: Trace, saliency: StepSaliency) -> None:
        """Write the files, and say of each what it is and how to read it."""
        console.print(f"\n{len(answer)} tokens, {len(answer.steps)} steps, {saliency.values.shape[0]} layers. Written:")
        with console.status("writing ..."):
            _draw(answer, saliency, self.picture)
            _print_file(self.picture, f"{HOW_TO_READ} {_finding(saliency)}".strip())
            if self.page:
                import stepsal

                stepsal.widgets.Explorer({saliency.model_name: saliency}).to_html(self.page)
                _print_file(self.page, "The same to explore: hover a cell to read its two steps, change the layer.")
            saliency.save(self.maps)
            _print_file(self.maps, "The maps of all layers as numbers: [layer, query step, key step].")


def _answer(
    question: str, model_name: str, *, target: Target, stepflow: bool, decoding: dict[str, Any]
) -> tuple[Trace, StepSaliency]:
    """Let a model answer, print the answer by steps, and return it with its maps."""
    import stepsal  # heavy imports wait until there is work to do, so that --help is quick

    config = stepsal.StepFlowConfig() if stepflow else None
    with console.status(f"loading {model_name} ..."):
        bridge = stepsal.load(model_name)
    with console.status("thinking ..."), _warnings_in_a_line():
        answer = stepsal.generate(bridge, question, stepflow=config, **decoding)
    for i, step in enumerate(answer.steps):
        text = Text(" ".join(answer.step_text(i).split()), style=ROLE_STYLES[step.role])
        console.print(Text(f"{i:3d} {step.role:9s}", style="dim"), text)
    if answer.truncated:
        console.print(Text(f"cut off after {len(answer) - answer.n_prompt} tokens", style="yellow"))
    with console.status("computing maps ..."):
        return answer, stepsal.step_saliency(bridge, answer, target=target, stepflow=config, progress=False)


@contextmanager
def _errors_in_a_line() -> Iterator[None]:
    """Print what went wrong without a traceback, and exit with status 1."""
    try:
        yield
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        console.print(Text(f"error: {error}", style="bold red"))
        raise typer.Exit(1) from error


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Print warnings of stepsal without the line of code that they come from."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in record:
        if issubclass(warning.category, UserWarning):
            console.print(Text(f"warning: {warning.message}", style="yellow"))


def _print_file(path: Path, words: str) -> None:
    """Print the path of a file, and below it what it is."""
    console.print(Text(f"  {path}", style="bold"), soft_wrap=True)
    console.print(Padding(Text(words, style="dim"), (0, 0, 0, 6)))


def _say_what_next(outputs: Outputs, model_name: str) -> None:
    """Print what one can do now."""
    lines = [
        f"open {outputs.page.resolve().as_uri()} in a browser" if outputs.page else "--html adds a page to explore",
        SMOLLM2 if model_name == "mini" else "--stepflow edits the attention while the answer is written",
        f'in Python: stepsal.StepSaliency.load("{outputs.maps}"); more in notebooks/00_quickstart.ipynb',
    ]
    console.print("\nNext:")
    for line in lines:
        console.print(Text(f"  {line}", style="cyan"), soft_wrap=True)


def _finding(saliency: StepSaliency) -> str:
    """Say how much of what a thinking step draws comes from near by; "" where thinking has fewer than three steps."""
    from stepsal.metrics import flow_metrics

    table = flow_metrics(saliency).set_index("layer")
    shares = [(table["own"] + table["previous"])[list(saliency.computed(band))].mean() for band in BANDS]
    if any(share != share for share in shares):
        return ""
    near, deep = (f"{100 * share:.0f} %" for share in shares)
    return f"Here a thinking step draws {near} from itself and the step before in shallow layers, {deep} in deep ones."


def _draw(answer: Trace, saliency: StepSaliency, path: Path) -> None:
    """Write a picture of the shallow and the deep quarter of the layers, as shares of rows on one scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    from stepsal import plots

    shares = saliency.row_normalised()
    with plots.style():
        fig, axes = plt.subplots(1, 2, figsize=(7.4, 4.3), layout="constrained")
        norm = LogNorm(LEAST_SHARE, 1, clip=True)
        for ax, band in zip(axes, BANDS, strict=True):
            plots.step_map(shares, band, ax=ax, norm=norm, colorbar=band == "deep")
            ax.set_title(f"{band} layers ({_range_in_words(shares.computed(band))} of {saliency.n_layers})")
        question = " ".join(answer.question.split())
        fig.suptitle(
            f"{saliency.model_name}: {question if len(question) <= 80 else question[:77] + '...'}\n"
            "where each step (row) draws from (column)",
        )  # fmt: skip
        fig.savefig(path, dpi=200, bbox_inches="tight")
        plt.close(fig)


def _range_in_words(layers: tuple[int, ...] | list[int]) -> str:
    """Return the numbers of neighbouring layers in words."""
    return f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else str(layers[0])


if __name__ == "__main__":
    app()
