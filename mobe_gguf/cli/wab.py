"""The options for the training output of MoBE's authors, shared by all commands that read factors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.names import WAB_ACTIVATIONS

if TYPE_CHECKING:  # an import of torch
    from mobe_gguf.models.wab import WabFiles


def wab_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--wab``, ``--activation`` and ``--wab-layers``; pass their values to :func:`wab_files`."""
    options = (
        click.option(
            "--wab",
            multiple=True,
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="Directory of the *_WAB.pth files that the authors' training wrote. MODEL is then the original. Repeatable.",
        ),
        click.option(
            "--activation",
            type=click.Choice(WAB_ACTIVATIONS),
            help="Activation that the files of --wab were trained with; they do not record it.",
        ),
        click.option(
            "--wab-layers",
            metavar="LIST",
            help="MoE layers to take from --wab, as 0-3,7. The others stay ordinary.  [default: all]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def wab_files(folders: tuple[Path, ...], activation: str | None, layers: str | None) -> WabFiles | None:
    """The files that these options name, None without the options; UsageError if one is given without the other."""
    if not folders:
        for name, value in (("--activation", activation), ("--wab-layers", layers)):
            if value is not None:
                raise UsageError(f"{name} is about the files of --wab DIR, which is not given")
        return None
    if activation is None:
        raise UsageError(
            "--wab needs --activation: the files do not say what they were trained with. It is what --activation "
            "of the authors' train.py was, silu if nothing was said there"
        )
    from mobe_gguf.core.layers import parse_layers
    from mobe_gguf.models.wab import WabFiles

    return WabFiles(folders, activation, None if layers is None else parse_layers(layers, "--wab-layers"))
