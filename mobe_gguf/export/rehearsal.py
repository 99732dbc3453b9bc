"""llama.cpp is asked before the work whether it takes the result: its converter by the model's headers, its loader by the head
of the file, whose data are left out."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from mobe_gguf import runtime
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.names import transform_name
from mobe_gguf.export.converter import HfConversion, NoVocabulary, convert
from mobe_gguf.export.shards import shard_paths
from mobe_gguf.export.write import Encoded, Head, stored_bytes
from mobe_gguf.formats.gguf import padded
from mobe_gguf.models.original import Original
from mobe_gguf.runtime.heads import check_head

#: Files of more bytes are asked about before they are written.  Smaller ones are written in seconds and then run.
LONG = 200_000_000


def ask_loader(of: object, head: Callable[[int], Head], shards: list[list[Encoded]], alignment: int) -> None:
    """MobeError if the runtime would refuse the files ``shards``: its loader compares keys, names and shapes.

    ``head(i)`` writes head i; ``of``: what the message is about.  Holes stand for the data, so nothing of their size is
    written.  Nothing is asked where the file system has no such files.
    """
    with tempfile.TemporaryDirectory(prefix="mobe-gguf-") as folder:
        paths = shard_paths(Path(folder) / "model.gguf", len(shards))
        with contextlib.suppress(OSError):
            for i, path in enumerate(paths):
                writer = head(i)
                writer.write_header_to_file(path)
                writer.write_kv_data_to_file()
                writer.write_ti_data_to_file()
                writer.close()
                size = padded(path.stat().st_size, alignment)
                os.truncate(path, size + sum(padded(tensor.nbytes, alignment) for tensor in shards[i]))
            check_head(paths[0], of)


def rehearse(checkpoint: Original) -> list[str]:
    """Find out before the work whether its result can be exported: run llama.cpp's converter over a Hugging Face
    model's headers, and its loader over the head of what comes out.

    MobeError if one refuses the tensors or config.json.  Returns a note if the converter refuses the tokenizer, which can be
    mended later, or if there is no runtime yet.  A GGUF file is not checked.
    """
    model = checkpoint.directory
    if model is None:
        return []
    try:
        runtime.source_tree()
    except MobeError:
        return [
            "llama.cpp is not built yet (mobe-gguf build), so it is not known whether its converter takes the model"
        ]
    conversion = convert(model, Path("model.gguf"))
    for layer in model.moe_layers:
        for projection in model.family.kinds:
            name, shape = (
                transform_name(layer, projection),
                (model.n_expert, *model.expert_shape(layer, projection)),
            )
            made = conversion.tensors.get(name)
            if made is None or tuple(made.source.shape) != shape:
                got = "no such tensor" if made is None else f"shape {list(made.source.shape)}"
                raise MobeError(
                    f"{model.path}: llama.cpp's converter makes {got} of {name}, expected {list(shape)}"
                )
    try:
        conversion.finish("MOSTLY_F16", Path("model.gguf"))
    except NoVocabulary as e:
        return [f"{e.message} Factors can be made; export needs the tokenizer"]
    _ask_about(model.path, conversion)
    return []


def _ask_about(path: Path, conversion: HfConversion) -> None:
    """:func:`ask_loader` about the model in float32, if that is large."""
    file = []
    for tensor in conversion.tensors.values():
        kind = tensor.forced or "f32"
        file.append(Encoded(tensor, kind, stored_bytes(tensor.source.shape, kind)))
    if sum(tensor.nbytes for tensor in file) > LONG:
        ask_loader(path, lambda i: conversion.header([file], i), [file], conversion.alignment)
