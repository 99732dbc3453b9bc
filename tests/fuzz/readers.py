"""Damaged files through this package's readers: GGUF of every kind, importance matrices, moments, checkpoints.

    python tests/fuzz/readers.py [--count 2000] [--seed 0] [--keep DIR]

The head of each is changed, or the file cut, as ``run.py`` does it for the loader.  Exit code 1 if a reader raises anything but the
error that users see, or takes more than ten seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from fuzz.damage import damaged, whole
from gguf import GGUFWriter
from safetensors.torch import save_file

from mobe_gguf.core.errors import MobeError, run_program
from mobe_gguf.core.progress import bar, console
from mobe_gguf.evaluate.inspect import describe
from mobe_gguf.evaluate.verify import verify
from mobe_gguf.formats.gguf import read_gguf
from mobe_gguf.formats.imatrix import ImatrixFile
from mobe_gguf.formats.moments import KEY, KEY_WEIGHS, Moments
from mobe_gguf.models.checkpoint import Checkpoint
from mobe_gguf.models.gguf_factors import GgufFactors
from mobe_gguf.models.gguf_source import GgufModel
from mobe_gguf.models.mobe_checkpoint import MobeCheckpoint

#: Seconds that a small file may take.
PATIENCE = 10


@dataclass(frozen=True)
class Kind:
    """``content`` is changed in its first ``end`` bytes and read by ``read(path)`` under the name ``name``."""

    what: str
    content: bytes
    end: int
    read: Callable[[Path], object]
    name: str = "case.gguf"


def kinds(folder: Path) -> Iterator[Kind]:
    """Every form that is read, each with all that is asked of it."""
    for what, file in whole().items():
        path = file.write(folder / "whole.gguf")
        end = min(tensor.offset for tensor in read_gguf(path).tensors.values())
        yield Kind(what, path.read_bytes(), end, read_model)
    path = imatrix(folder / "imatrix.gguf")
    end = min(tensor.offset for tensor in read_gguf(path).tensors.values())
    yield Kind("imatrix", path.read_bytes(), end, read_imatrix)
    path = moments(folder / "moments.safetensors")
    yield Kind("moments", path.read_bytes(), header_end(path), read_moments, "case.safetensors")
    path = checkpoint(folder / "mobe")
    yield Kind("checkpoint", path.read_bytes(), header_end(path), read_checkpoint, "model.safetensors")
    config = folder / "mobe" / "config.json"
    yield Kind("config.json", config.read_bytes(), config.stat().st_size, read_checkpoint, "config.json")
    for what, fused in (("ordinary", False), ("fused", True)):
        path = original(folder / what, fused)
        yield Kind(f"{what} in shards", path.read_bytes(), header_end(path), read_original, path.name)
    for name in ("config.json", "model.safetensors.index.json"):
        path = folder / "ordinary" / name
        yield Kind(f"{name} of an original", path.read_bytes(), path.stat().st_size, read_original, name)
    factors_of(folder / "plain.gguf", folder / "factors")
    for path in (
        folder / "factors" / "factors.json",
        *sorted((folder / "factors").glob("*.safetensors"))[:1],
    ):
        end = path.stat().st_size if path.suffix == ".json" else header_end(path)
        yield Kind(f"{path.suffix[1:]} of factors", path.read_bytes(), end, read_factors, path.name)


#: The directory beside a kind's file.
BESIDE = {
    "checkpoint": "mobe",
    "config.json": "mobe",
    "ordinary in shards": "ordinary",
    "fused in shards": "fused",
    "config.json of an original": "ordinary",
    "model.safetensors.index.json of an original": "ordinary",
    "json of factors": "factors",
    "safetensors of factors": "factors",
}


def header_end(path: Path) -> int:
    with open(path, "rb") as f:
        return 8 + int(struct.unpack("<Q", f.read(8))[0])


def imatrix(path: Path) -> Path:
    writer = GGUFWriter(path, "")
    for layer in range(2):
        for projection in ("gate", "up"):
            stem = f"blk.{layer}.ffn_{projection}_exps.weight"
            writer.add_tensor(f"{stem}.in_sum2", np.ones((8, 64), np.float32))
            writer.add_tensor(f"{stem}.counts", np.ones((8, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def moments(path: Path) -> Path:
    stem = "blk.0.ffn_gate_exps"
    tensors = {
        f"{stem}.root": torch.ones(8, 64, 4, dtype=torch.float16),
        f"{stem}.rest": torch.ones(8, 64, dtype=torch.float16),
        f"{stem}.scale": torch.ones(1),
        f"{stem}.tokens": torch.ones(8, dtype=torch.int32),
    }
    weighs = {f"blk.0.ffn_{x}_exps.weight": stem for x in ("gate", "up")}
    about = {"version": 2, "source_checksum": "0", "tokens": 8}
    save_file(tensors, path, {KEY: json.dumps(about), KEY_WEIGHS: json.dumps(weighs)})
    return path


def checkpoint(folder: Path) -> Path:
    import tiny
    from export.handmade import make_mobe

    source = tiny.make_model("qwen3_moe", folder.with_name("original"), num_hidden_layers=1)
    make_mobe(source, folder)
    return folder / "model.safetensors"


def original(folder: Path, fused: bool) -> Path:
    """A shard of an ordinary model with experts in FP8 in one of its two layers, if they are not fused."""
    import tiny
    from models.editing import to_fp8
    from safetensors.torch import load_file

    tiny.make_model("qwen3_moe", folder, num_hidden_layers=2, max_shard_size="200KB", fused=fused)
    shards = sorted(folder.glob("*.safetensors"))
    if fused:
        return shards[0]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for shard in shards:
        tensors = load_file(shard)
        for name in [n for n in tensors if ".layers.1.mlp.experts." in n]:
            tensors[name], tensors[name + "_scale_inv"] = to_fp8(tensors[name], 16)
            index["weight_map"][name + "_scale_inv"] = shard.name
        save_file(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    return shards[-1]


def factors_of(source: Path, out: Path) -> None:
    from parity.gguf_files import qwen3moe

    from mobe_gguf.factorize.job import prepare, run
    from mobe_gguf.factorize.plan import Options

    run(prepare(qwen3moe().write(source), out, Options(bases=2, steps=1)), quiet=True)


def read_original(path: Path) -> None:
    """``path`` lies beside the rest of the model."""
    model = Checkpoint(path.parent)
    model.check_whole()
    model.check_values()
    for layer in model.moe_layers:
        for projection in ("gate", "down"):
            model.expert(layer, projection, 0)
    model.copies([(model.moe_layers[0], "up")])


def read_factors(path: Path) -> None:
    model = GgufFactors(path.parent)
    model.check_whole()
    model.open_source()
    for index in model.moe_layers:
        layer = model.layer(index)
        for projection in layer.projections:
            layer.mix(projection)
            layer.transform(projection, 0)


def read_model(path: Path) -> None:
    verify(path, quiet=True)
    describe(path)
    if any("_basis" in name for name in read_gguf(path).tensors):
        return
    model = GgufModel(path)
    model.check_whole()
    for layer in model.moe_layers:
        model.check_experts(layer, "down")


def read_imatrix(path: Path) -> None:
    file = ImatrixFile(path)
    file.keys()
    for layer in range(2):
        file.weight(layer, "gate", 8, 64)


def read_moments(path: Path) -> None:
    file = Moments(path)
    for name in file.names:
        file.shape(name)
        file.find(name)
        file.scale(name)
        file.tokens(name)
    file.check(0, "gate", 8, 64)


def read_checkpoint(path: Path) -> None:
    """``path`` lies beside the rest of the model."""
    model = MobeCheckpoint(path.parent)
    model.check_whole()
    model.check_values()
    for index in model.moe_layers:
        layer = model.layer(index)
        for projection in layer.projections:
            layer.mix(projection)
            layer.transform(projection, 0)


def fault_of(read: Callable[[Path], object], path: Path) -> str | None:
    """What a reader did beside reading or refusing."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE)
    try:
        read(path)
    except MobeError:
        return None
    except Exception as e:
        at = e.__traceback__
        while at is not None and at.tb_next is not None:
            at = at.tb_next
        where = f"{Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno}" if at else "?"
        return f"{type(e).__name__} at {where}: {e}"
    finally:
        signal.alarm(0)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000, help="damaged files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="put files at fault here")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    faults: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name, bar("damaged files", options.count) as progress:
        folder = Path(name)
        ready = list(kinds(folder))
        for kind in ready:
            (folder / kind.what).mkdir(exist_ok=True)
            if beside := BESIDE.get(kind.what):
                shutil.copytree(folder / beside, folder / kind.what, dirs_exist_ok=True)
            (folder / kind.what / kind.name).write_bytes(kind.content)
            kind.read(folder / kind.what / kind.name)  # the whole one is read
        for i in range(options.count):
            kind = ready[i % len(ready)]
            path = folder / kind.what / kind.name
            path.write_bytes(damaged(kind.content, kind.end, rng))
            if fault := fault_of(kind.read, path):
                faults[fault.split(":")[0] + ":" + fault.split(":")[1]] += 1
                console.print(f"{kind.what}, change {i}: {fault}", markup=False, highlight=False)
                if options.keep:
                    options.keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, options.keep / f"{kind.what}-{i}{path.suffix}")
            progress.advance(1)
    print(f"{options.count} damaged files, {sum(faults.values())} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    run_program(main)
