"""llama.cpp's own converter as a program: any model that it knows, to a plain GGUF file.

It runs in a process of its own, because it changes what other modules import and ends the whole process if it refuses a
model. Python code in the model's directory is not run, see ``converter``.
"""

from __future__ import annotations

import inspect
import json
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from mobe_gguf import runtime
from mobe_gguf.core.atomic import atomic_path, check_output
from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.files import check_name, check_space
from mobe_gguf.core.progress import bar
from mobe_gguf.export import tokenizer
from mobe_gguf.formats.gguf import GgufFile, missing_tensors, read_gguf
from mobe_gguf.models.config_types import check_types
from mobe_gguf.models.config_values import check_values
from mobe_gguf.models.families import OTHERWISE, family_of, known_model_types, other_way

#: ``--outtype``, the type of matrices; "auto" takes f16 or bf16 as the source's first matrix has it.
TYPES = ("auto", "bf16", "f16", "f32", "q8_0")
#: Bytes per weight in each type, at most.
BYTES = {"auto": 2.0, "bf16": 2.0, "f16": 2.0, "f32": 4.0, "q8_0": 34 / 32}
#: Bytes per weight in safetensors.
STORED = {"F64": 8.0, "F32": 4.0, "F16": 2.0, "BF16": 2.0, "F8_E4M3": 1.0, "F8_E5M2": 1.0, "U8": 0.5, "I8": 1.0}  # fmt: skip

SCRIPT = "convert_hf_to_gguf.py"
#: Seconds between two looks at the growing file, and how many last lines an error shows.
LOOK, TAIL = 0.5, 6


def convert_model(
    model: Path, out: Path, outtype: str = "auto", tokenizer_pre: str | None = None, quiet: bool = False
) -> None:
    """Write ``model``, a Hugging Face directory, as the GGUF file ``out``.

    ``tokenizer_pre``: value of ``tokenizer.ggml.pre``, instead of the recognized one. MobeError if ``model`` is no such
    directory, the converter does not know its architecture or fails, or there is no room.
    """
    check_name(str(out))
    check_output(out, [model])
    script = runtime.source_tree() / SCRIPT
    if not script.is_file():
        raise MobeError(f"{script}: the installed runtime lacks llama.cpp's converter; run mobe-gguf build")
    config, architecture = _config(model)
    _check_answers(model, config)
    expected = _expected_bytes(model, outtype)
    check_space(out, expected, (), "choose another place, or --outtype q8_0")
    with atomic_path(out) as part, tempfile.TemporaryFile() as log, bar("convert", round(expected / 1e6), quiet) as progress:  # fmt: skip
        command = [sys.executable, "-m", "mobe_gguf.export.hf_to_gguf", str(model), str(part), outtype]
        command += [] if tokenizer_pre is None else [tokenizer_pre]
        done = 0.0

        def look() -> None:
            nonlocal done
            size = min(part.stat().st_size / 1e6, expected / 1e6) if part.exists() else 0.0
            if progress.is_live and size > done:
                progress.advance(size - done)
                done = size

        code = _run(command, log, look)
        if code != 0 or not part.stat().st_size:
            raise MobeError(_why(model, architecture, code, _text(log)))
        if lacking := _lacking(read_gguf(part)):
            raise MobeError(
                f"{model}: of what config.json promises, {lacking} is missing; download the model again"
            )


def _lacking(file: GgufFile) -> str | None:
    """The first tensor or layer that is missing from the file, None if nothing is."""
    if missing := missing_tensors(file):
        return f"tensor {missing[0]}"
    layers = {int(name.split(".")[1]) for name in file.tensors if name.startswith("blk.")}
    return next((f"layer blk.{i}" for i in range(file.arch_number("block_count")) if i not in layers), None)


def _config(model: Path) -> tuple[dict[str, Any], str]:
    """config.json and the architecture that it names."""
    path = model / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return config, str((config.get("architectures") or [config.get("model_type")])[0])
    except (OSError, ValueError, AttributeError, TypeError, LookupError) as e:
        raise MobeError(
            f"{model}: expected a Hugging Face model directory; {path} cannot be read: {e}"
        ) from e


def _check_answers(model: Path, config: dict[str, Any]) -> None:
    """MobeError where llama.cpp's converter would drop what config.json says, or its graph computes another model."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in OTHERWISE:
        raise MobeError(f"{model}: {other_way(model_type)}")
    if model_type not in known_model_types():
        return
    family = family_of(config)
    check_types(family.declared(config), config, model)
    judgement = check_values(family.name, family.text(config), model)
    if judgement.keys or judgement.hparams:
        raise MobeError(
            f"{model}: llama.cpp's converter drops what this model's config.json says; export carries it:\n"
            f"  mobe-gguf export {model} model.gguf --dense --quant bf16"
        )


def _expected_bytes(model: Path, outtype: str) -> int:
    """Estimated size of the file, from the tensors' sizes and types in safetensors' headers."""
    total = 0.0
    for path in model.glob("*.safetensors"):
        with open(path, "rb") as file:
            head = file.read(1 << 16)
        kinds = re.findall(rb'"dtype":"(\w+)"', head)
        stored = max((STORED.get(kind.decode(), 2.0) for kind in kinds), default=2.0)
        total += path.stat().st_size * BYTES[outtype] / stored
    if not total:
        total = sum(path.stat().st_size for path in model.glob("pytorch_model*.bin"))
    return round(total)


def _run(command: list[str], log: IO[bytes], look: Callable[[], None]) -> int:
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as process:
        try:
            while True:
                try:
                    return process.wait(LOOK)
                except subprocess.TimeoutExpired:
                    look()
        except BaseException:
            process.kill()
            raise


def _text(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")


def _why(model: Path, architecture: str, code: int, said: str) -> str:
    """One line if the reason is known, else the converter's last lines."""
    if re.search(r"Model .+ is not supported", said):
        return (
            f"{model}: llama.cpp's converter does not know {architecture}; nothing here can read this model"
        )
    own = re.findall(r"^mobe-gguf: (.+)", said, re.MULTILINE)
    if own:
        return own[-1]
    lines = [line for line in re.split(r"[\r\n]+", said.strip()) if not line.startswith("Writing:")][-TAIL:]
    tail = "".join(f"\n  {line}" for line in lines)
    return f"{model}: llama.cpp's converter failed on {architecture} (exit code {code}):{tail}"


def _child(model: str, part: str, outtype: str, pre: str | None = None) -> None:
    """Run the converter; called in a process of its own."""
    from mobe_gguf.export.converter import no_remote_code

    runtime.use_conversion()
    script = runtime.source_tree() / SCRIPT
    sys.argv = [str(script), model, "--outfile", part, "--outtype", outtype]
    try:
        _name_tokenizers(pre)
        with no_remote_code(Path(model)):
            runpy.run_path(str(script), run_name="__main__")
    except MobeError as e:
        sys.exit(f"mobe-gguf: {e.message}")


def _name_tokenizers(pre: str | None) -> None:
    """Make the converter use ``pre``, or recognize an unknown tokenizer by its tokenizer.json."""
    import conversion

    base, own = conversion.base.TextModel, conversion.base.TextModel.get_vocab_base_pre
    if pre is not None:
        tokenizer.check_name(pre, tokenizer.known_names(inspect.getsource(own)))

    def get_vocab_base_pre(self: Any, tokenizer_: Any) -> str:
        if pre is not None:
            return pre
        try:
            return own(self, tokenizer_)
        except NotImplementedError:
            return tokenizer.recognize(self.dir_model).name

    base.get_vocab_base_pre = get_vocab_base_pre


if __name__ == "__main__":
    _child(*sys.argv[1:])
