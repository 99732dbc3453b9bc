"""What a caller asks of an export: one object, passed from the command line through all stages."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.files import check_name, format_size
from mobe_gguf.models.wab import WabFiles
from mobe_gguf.quant.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Everything but the model, the file and the types.

    - ``tokenizer_pre``: value of ``tokenizer.ggml.pre``, instead of the recognized one.
    - ``split_max_size``: bytes of tensors in one file, see ``shards``.
    - ``experts_used``: experts that a token uses, instead of the number in config.json.
    - ``allow_dense``: also take a model without factors; its experts are written as they are.
    - ``dense``: write ordinary experts of any model; factors are multiplied out.
    - ``wab``: the training output of MoBE's authors; ``model`` is the original model then.
    - ``source``: the GGUF file that the factors were made of, if it has moved.
    - ``rest_from``: a GGUF file of the same model, in fewer bits: all tensors except factors are taken from it.
    - ``refit``: solve for A and the mix again where the bases are quantized, see ``refit``.
    - ``original``: the model that the factors were made of, if it has moved.
    - ``base_model``: the original's id on the hub, for the metadata.
    - ``sequential``: texts; the experts are rounded layer by layer as these flow through them, see ``sequential``.
      ``chunks``, ``memory``, ``device``: of that run, as in ``calibrate.moments``.
    - ``card``: write a README.md beside the file, see ``card``.
    - ``dry_run``: plan everything, write nothing.
    """

    tokenizer_pre: str | None = None
    split_max_size: int | None = None
    experts_used: int | None = None
    allow_dense: bool = False
    dense: bool = False
    wab: WabFiles | None = None
    source: str | os.PathLike[str] | None = None
    rest_from: str | os.PathLike[str] | None = None
    refit: bool = True
    original: str | os.PathLike[str] | None = None
    base_model: str | None = None
    sequential: tuple[Path, ...] = ()
    chunks: int | None = None
    memory: int | None = None
    device: str = "cpu"
    card: bool = False
    dry_run: bool = False
    verbose: bool = False
    quiet: bool = False

    def words(self) -> tuple[str, ...]:
        """These options as in the card's command, with file names instead of paths."""
        words = [] if self.experts_used is None else [f"--experts-used {self.experts_used}"]
        if self.split_max_size is not None:
            words.append(f"--split-max-size {format_size(self.split_max_size)}")
        if self.wab is not None:
            words += [f"--wab {path.absolute().name}/" for path in self.wab.folders]
            words.append(f"--activation {self.wab.activation}")
        words += [f"--sequential {path.name}" for path in self.sequential]
        return tuple(words)


@dataclass(frozen=True)
class ExportRequest:
    """Write ``model`` to the GGUF file ``out`` in the types of ``recipe``."""

    model: Path
    out: Path
    recipe: Recipe
    options: ExportOptions = ExportOptions()

    @property
    def inputs(self) -> list[str | os.PathLike[str] | None]:
        """The files and directories that are named to be read."""
        options, recipe = self.options, self.recipe
        return [
            self.model, options.source, options.rest_from, options.original, *recipe.imatrix, recipe.moments,
            *(options.wab.folders if options.wab is not None else ()),
        ]  # fmt: skip

    def check(self) -> None:
        """UsageError if a file's name cannot go into the metadata or the card, or options do not fit each other."""
        if self.options.sequential and not self.recipe.moments:
            raise UsageError("--sequential rounds experts by their moments: give --moments FILE, too")
        for path in (self.out, *self.recipe.imatrix, self.recipe.moments):
            if path is not None:
                check_name(str(path))
