"""Reading llama-imatrix files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from mobe_gguf.core.errors import MobeError
from mobe_gguf.core.metric import PRIOR
from mobe_gguf.formats.imatrix import ImatrixFile


def write(path, sums, counts, layer=0, projections=("gate", "up")):
    """As llama-imatrix does: ``in_sum2`` of ggml shape [d, n], ``counts`` [1, n]."""
    writer = GGUFWriter(path, "")
    for projection in projections:
        stem = f"blk.{layer}.ffn_{projection}_exps.weight"
        writer.add_tensor(f"{stem}.in_sum2", np.asarray(sums, dtype=np.float32))
        writer.add_tensor(f"{stem}.counts", np.asarray(counts, dtype=np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_are_mean_squares_by_use(tmp_path):
    sums, counts = np.array([[8.0, 4.0], [0.0, 0.0], [1.0, 3.0]]), np.array([4.0, 0.0, 2.0])
    weight = ImatrixFile(write(tmp_path / "i.gguf", sums, counts)).weight(0, "up", 3, 2)
    mean = sums.sum(0) / 6
    expected = (sums + PRIOR * 2 * mean) / 6
    assert weight.shape == (3, 1, 2)
    assert torch.allclose(weight[:, 0], torch.from_numpy(expected))
    assert (weight > 0).all(), "an expert that was never used must keep some weight"


def test_errors(tmp_path):
    path = write(tmp_path / "i.gguf", np.ones((3, 2)), np.ones(3))
    with pytest.raises(MobeError, match="blk.5.ffn_gate_exps.weight.in_sum2"):
        ImatrixFile(path).weight(5, "gate", 3, 2)
    with pytest.raises(MobeError, match="6 sums and 3 counts, expected 4 x 2 and 4"):
        ImatrixFile(path).weight(0, "gate", 4, 2)
    with pytest.raises(MobeError, match="one count for 3 experts: the file was converted from the old .dat"):
        ImatrixFile(write(tmp_path / "d.gguf", np.ones((3, 2)), np.ones(1))).weight(0, "gate", 3, 2)
    with pytest.raises(MobeError, match="no such file"):
        ImatrixFile(tmp_path / "absent")
    (tmp_path / "old.dat").write_bytes(b"\x01\x00\x00\x00")
    with pytest.raises(MobeError, match="old .dat format"):
        ImatrixFile(tmp_path / "old.dat")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:40])
    with pytest.raises(MobeError, match="the file ends at 40"):
        ImatrixFile(tmp_path / "cut.gguf")


def test_a_layer_without_counts_weighs_all_alike(tmp_path):
    file = ImatrixFile(write(tmp_path / "z.gguf", np.ones((3, 2)), np.zeros(3)))
    assert torch.equal(file.weight(0, "gate", 3, 2), torch.ones(3, 1, 2, dtype=torch.float64))
    assert len(file.notes) == 1 and "no rows were counted" in file.notes[0]


def test_gate_and_up_have_the_same_inputs(tmp_path):
    """Entries of one of them do for both, those of down do not."""
    sums, counts = np.array([[8.0, 4.0], [1.0, 2.0], [1.0, 3.0]]), np.array([4.0, 1.0, 2.0])
    path = write(tmp_path / "i.gguf", sums, counts)
    both = ImatrixFile(path)
    data = path.read_bytes()
    for missing, left in ((b"ffn_gate_exps", "up"), (b"ffn_up_exps", "gate")):
        one = tmp_path / f"{left}.gguf"
        one.write_bytes(data.replace(missing, b"x" * len(missing)))
        for projection in ("gate", "up"):
            assert torch.equal(ImatrixFile(one).weight(0, projection, 3, 2), both.weight(0, projection, 3, 2))
        assert ImatrixFile(one).entry("blk.0.ffn_down_exps.weight") is None
