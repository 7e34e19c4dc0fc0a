"""The command line: `stepsal trace`, which answers a question and writes the answer's step maps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from stepsal.layers import Band
    from stepsal.maps import StepSaliency

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
console = Console()

ROLE_STYLES = {"question": "bold blue", "thinking": "default", "summary": "bold green"}


@app.callback()  # without it Typer would take the only command for the whole program
def main() -> None:
    """See how information flows between the steps of a reasoning model's trace."""


@app.command()
def trace(
    question: Annotated[str, typer.Argument(help="What to ask the model.")],
    model: Annotated[str, typer.Option(help="**mini**, **smollm2**, a hub id or a local folder.")] = "mini",
    out: Annotated[Path, typer.Option(help="Where to write: OUT.safetensors (the maps), OUT.png.")] = Path("trace"),
    target: Annotated[
        Literal["token", "sequence"],
        typer.Option(help="**token**: loss of each next token; **sequence**: their sum."),
    ] = "token",
    stepflow: Annotated[bool, typer.Option("--stepflow", help="Write and map the answer under StepFlow.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Limit of the answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Answer a question, print the answer step by step, and write its step maps.

    The picture shows the shallow and the deep quarter of the layers; the maps of all layers are in OUT.safetensors,
    to be read with `stepsal.StepSaliency.load`.

    Example: `stepsal trace --model smollm2 "A pen costs 3 euros. What do 4 pens cost?"`
    """
    import stepsal  # heavy imports wait until there is work to do, so that --help is quick

    if not out.resolve().parent.is_dir():
        raise typer.BadParameter(f"the folder {out.resolve().parent} does not exist", param_hint="--out")
    config = stepsal.StepFlowConfig() if stepflow else None
    try:
        with console.status(f"loading {model} ..."):
            bridge = stepsal.load(model)
        with console.status("thinking ..."):
            answer = stepsal.generate(
                bridge, question, stepflow=config, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
            )
        for i, step in enumerate(answer.steps):
            label = Text(f"{i:3d} {step.role:9s}", style="dim")
            console.print(label, Text(" ".join(answer.step_text(i).split()), style=ROLE_STYLES[step.role]))
        if answer.truncated:
            console.print(Text(f"cut off after {len(answer) - answer.n_prompt} tokens", style="yellow"))
        with console.status("computing maps ..."):
            saliency = stepsal.step_saliency(bridge, answer, target=target, stepflow=config)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        console.print(Text(f"error: {error}", style="bold red"))
        raise typer.Exit(1) from error
    maps = saliency.save(out)
    picture = out.with_name(out.name + ".png")
    _draw(saliency, picture)
    console.print(Text(f"{len(answer)} tokens, {len(answer.steps)} steps; wrote {maps} and {picture}", style="dim"))


def _draw(saliency: StepSaliency, path: Path) -> None:
    """Write a picture of the shallow and the deep quarter of the layers, on one scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from stepsal import plots

    with plots.style():
        fig, axes = plt.subplots(1, 2, figsize=(7.4, 3.6), layout="constrained")
        bands: tuple[Band, ...] = ("shallow", "deep")
        norm = plots.shared_norm([saliency.mean_over(band) for band in bands])
        for ax, band in zip(axes, bands, strict=True):
            plots.step_map(saliency, band, ax=ax, norm=norm, colorbar=band == "deep")
            ax.set_title(f"{band} layers")
        fig.savefig(path, dpi=200)
        plt.close(fig)


if __name__ == "__main__":
    app()
