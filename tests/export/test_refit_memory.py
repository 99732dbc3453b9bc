"""What solving again takes: the bases of one group twice, however many groups there are."""

from __future__ import annotations

import peak
import pytest

#: Bases so large, and experts so few and small, that nothing else counts much: 34 MB a group.  Prints the peak in such groups.
UNIT = """
import sys
import peak, torch
from mobe_gguf.export import refit, type_errors

n, p, r, d, m = 8, 32, 256, 1024, 32
what, projection, groups = sys.argv[1], sys.argv[2], int(sys.argv[3])

class Checkpoint:
    n_expert, n_embd, n_ff_exp, activation, config = n, d, p, "tanh", {}

    def width(self, layer):
        return p

class Layer:
    checkpoint, index = Checkpoint(), 0

    def group_count(self, projection):
        return groups

    def rank(self, projection):
        return r

    def mix(self, projection):
        return torch.randn(n, m)

    def transform(self, projection, e):
        return torch.randn((r, p) if projection == "down" else (p, r))

    def group_basis(self, projection, i):
        return torch.empty((m, d, r) if projection == "down" else (m, r, d)).normal_()

class Tensor:
    name = "A"

torch.set_num_threads(1)
refit.BLOCK_BYTES = 0  # an expert at a time
unit = refit.Unit(Layer(), projection, "q8_0")
refit.decoded(torch.randn(4, 64), "q8_0", None, "what any encoding loads")
torch.linalg.cholesky_ex(torch.eye(4))
with peak.watched() as taken:
    if what == "moments":
        unit.transform_weights()
    elif what == "solve":
        for _ in refit.Solved(Tensor(), "q8_0", 0, None, unit)._solve():
            pass
    else:
        type_errors._basis(unit, ["q8_0", "q4_0", "q5_0"], True, None)
print(taken[0] / (4 * m * r * d))
"""


@pytest.mark.parametrize(
    ("what", "projection", "groups"),
    [
        ("moments", "gate", 2),
        ("solve", "gate", 1),
        ("solve", "gate", 2),
        ("solve", "down", 2),
        ("divide", "gate", 1),
    ],
)
def test_the_bases_of_one_group_are_held_twice(what, projection, groups):
    """Beside them an expert's matrices (0.7 of such a group here), where bits are divided those of four (1.1)."""
    found = float(peak.run(UNIT, what, projection, groups))
    assert 2 < found < (3.2 if what == "divide" else 2.9)
