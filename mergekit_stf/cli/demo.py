"""``mergekit-stf demo``: train, merge through ``mergekit-yaml``, print what came out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from mergekit_stf.cli.common.errors import Terminated
from mergekit_stf.cli.common.out_folder import OutFolder
from mergekit_stf.cli.common.terminal import echo
from mergekit_stf.core.errors import STFError
from mergekit_stf.demo.merging import METHODS
from mergekit_stf.demo.run import MARK, Results, clear, model_losses, run_demo, total_steps
from mergekit_stf.demo.training import Settings
from mergekit_stf.host.outputs.out_folder import out_folder
from mergekit_stf.host.run.signals import add_note

BAR, REST, WIDTH = "█", "░", 32
"""The bars of the picture."""


@click.command("demo")
@click.argument("directory", type=OutFolder(), default="stf-demo")
@click.option("--seed", default=0, show_default=True, help="Of the weights and the text's order.")
@click.option("--quick", is_flag=True, help="Much smaller models: seconds, and figures to match.")
@click.option(
    "--measure",
    metavar="MODEL",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Train nothing: print the loss of a model of the demo on validation text, the mean last.",
)
@click.option("--force", is_flag=True, help="Replace an earlier demo in DIRECTORY.")
def command(directory: Path, seed: int, quick: bool, measure: Path | None, force: bool) -> None:
    """Train a tiny base and its specialists, merge them, and print what each merge does.

    Trains a byte-level Llama on text that this Python installation carries, fine-tunes one
    specialist a kind of text, writes all of them as Hugging Face checkpoints into DIRECTORY
    (stf-demo unless given), merges them through mergekit-yaml with linear, task_arithmetic, ties,
    stf and wudi, and measures every model on held-out text. Downloads nothing, takes about a minute
    on two cores, and the same seed on the same machine gives the same figures.

    \b
    Example:
      mergekit-stf demo
      mergekit-stf demo elsewhere --seed 1
      mergekit-stf sweep recipes/stf.yml sweep --lambda 0.3:1.0:0.1 \\
        --eval "mergekit-stf demo --measure {out}" --lower-is-better
    """
    settings = Settings.tiny() if quick else Settings()
    transformers_logging.disable_progress_bar()
    if measure:
        losses = model_losses(measure, settings, "validation")
        for kind, loss in {**losses, "mean": sum(losses.values()) / len(losses)}.items():
            echo(f"{kind} {loss:.4f}")
        return
    _prepare(directory, force)
    for line in _introduction(settings):
        echo(line)
    try:
        with ProgressLine(total_steps(settings)) as progress:
            results = run_demo(directory, settings, seed, progress.advance)
    except (KeyboardInterrupt, Terminated) as error:
        add_note(error, _state(directory))
        raise
    lines = (*_table(results), "", *_picture(results), "", *_verdict(results), "")
    for line in (*lines, *_next_steps(directory)):
        echo(line)


def _introduction(settings: Settings) -> Iterator[str]:
    kinds = ", ".join(settings.kinds)
    yield f"A tiny language model is tuned on {len(settings.kinds)} kinds of text, one copy each:"
    yield f"{kinds}. The copies are merged into one model by {len(METHODS)} methods, through"
    yield "mergekit-yaml. Shown is how well each model predicts text that none has seen. The text"
    yield "comes from this Python, nothing is downloaded. It takes about a minute on two cores."
    yield ""


class ProgressLine:
    """One line on the standard error stream: a bar, or where that is no terminal, names.

    Args:
        total: steps of the whole work.
    """

    def __init__(self, total: int) -> None:
        self._shown = sys.stderr.isatty()
        self._bar = tqdm(total=total, unit="step", dynamic_ncols=True, disable=not self._shown)
        self._label = ""

    def __enter__(self) -> ProgressLine:
        """Begin the line."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the line."""
        self._bar.close()
        if self._label and not self._shown:
            echo("", err=True)

    def advance(self, label: str, steps: int) -> None:
        """Show what is being done, and that so many steps of it were just done."""
        if label != self._label and not self._shown:
            echo(f", {label}" if self._label else label, err=True, nl=False)
        self._bar.set_description(label, refresh=label != self._label)
        self._label = label
        self._bar.update(steps)


def _prepare(directory: Path, force: bool) -> None:
    directory = out_folder(directory)
    if directory.exists() and not directory.is_dir():
        raise STFError(f"{directory} is a file; name a directory")
    if directory.exists() and any(directory.iterdir()):
        if not force:
            raise STFError(
                f"{directory} is not empty: name another directory, or give --force to replace "
                "an earlier demo in it (other files stay)"
            )
        clear(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARK).touch()


def _state(directory: Path) -> str:
    made = [
        path.relative_to(directory).as_posix()
        for path in sorted(directory.glob("m*/*"))
        if path.suffix != ".partial"
    ]
    return (
        f"Complete in {directory}: {', '.join(made) or 'nothing'}. "
        f"`mergekit-stf demo {directory} --force` starts again."
    )


def _table(results: Results) -> Iterator[str]:
    kinds = list(results.settings["kinds"])
    yield "Held-out loss in bits per byte, smaller is better"
    yield ""
    yield f"{'model':<34}" + "".join(f"{name:>10}" for name in (*kinds, "mean"))
    for model, losses in results.bits_per_byte.items():
        if model == next(iter(METHODS)):
            yield ""
        figures = [*losses.values(), sum(losses.values()) / len(kinds)]
        yield f"{_describe(model, results):<34}" + "".join(f"{x:>10.3f}" for x in figures)


def _picture(results: Results) -> Iterator[str]:
    """Draw how much of the specialists' gains each merge keeps."""
    yield "What one merged model keeps of what the specialists gained, each on its own text"
    yield ""
    for method, share in results.kept_gains().items():
        bar = BAR * round(WIDTH * min(max(share, 0.0), 1.0))
        yield f"{_describe(method, results):<34}{bar:{REST}<{WIDTH}} {share:>4.0%}"


def _describe(model: str, results: Results) -> str:
    if model not in results.parameters:
        return model if model == "base" else f"{model} specialist"
    given = ", ".join(f"{key} {value}" for key, value in results.parameters[model].items())
    return f"{model} ({given})" if given else model


def _verdict(results: Results) -> Iterator[str]:
    beaten = results.beaten_specialists()
    if beaten:
        yield f"Not the best unmerged model on its own text: the specialist for {', '.join(beaten)}"
    else:
        yield "Each specialist is the best unmerged model on its own text."
    means = {m: sum(results.bits_per_byte[m].values()) for m in METHODS}
    yield f"Merges from best to worst mean: {', '.join(sorted(means, key=means.__getitem__))}."
    spent = results.seconds["whole"]
    yield f"{spent:.0f} s, of which {results.seconds['training']:.0f} s of training."


def _next_steps(directory: Path) -> Iterator[str]:
    yield "Look at next:"
    yield f"  {directory / 'recipes' / 'stf.yml'}  the recipe: ordinary mergekit YAML"
    yield f"  {directory / 'merged' / 'stf'}  the merged model: an ordinary checkpoint"
    yield f"  {directory / 'results.json'}  every figure of the table"
    yield "Try next:"
    yield f"  cd {directory}"
    yield "  mergekit-yaml recipes/stf.yml merged/again   # change `lambda` or `density` before"
    yield "  mergekit-stf plan recipes/stf.yml"
    yield "  mergekit-stf sweep recipes/stf.yml sweep --lambda 0.3:1.0:0.1 \\"
    yield "    --eval 'mergekit-stf demo --measure {out}' --lower-is-better"
    yield "  mergekit-stf merge recipes/stf.yml merged/checked"
    yield "  mergekit-stf report merged/checked"
