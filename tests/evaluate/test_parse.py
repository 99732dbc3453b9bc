"""Reading llama-perplexity's output: its numbers, and that nothing missing goes unnoticed."""

from __future__ import annotations

import math

import pytest

from mobe_gguf.evaluate import parse
from mobe_gguf.evaluate.parse import Estimate, ParseError

#: A real run's, with fewer chunks.
OUTPUT = """\
0.02 minutes

chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS            Same top p
   1      23.0304 ±    3.2717      -0.00176 ±    0.01444       0.02446 ±    0.00213     3.679 ±  0.394 %    87.451 ±  2.079 %
   2      23.5363 ±    2.3447       0.01596 ±    0.00963       0.02172 ±    0.00132     3.917 ±  0.342 %    87.843 ±  1.448 %

====== Perplexity statistics ======
Mean PPL(Q)                   :  24.996685 ±   1.272165
Mean PPL(base)                :  24.400866 ±   1.239989
Cor(ln(PPL(Q)), ln(PPL(base))):  99.48%
Mean ln(PPL(Q)/PPL(base))     :   0.024125 ±   0.005168
Mean PPL(Q)/PPL(base)         :   1.024418 ±   0.005295
Mean PPL(Q)-PPL(base)         :   0.595819 ±   0.131622

====== KL divergence statistics ======
Mean    KLD:   0.023957 ±   0.001234
Maximum KLD:   1.771608
99.9%   KLD:   0.577886
99.0%   KLD:   0.191601
95.0%   KLD:   0.078939
90.0%   KLD:   0.046273
Median  KLD:   0.012352
10.0%   KLD:   0.003517
 5.0%   KLD:   0.002516
 1.0%   KLD:   0.000524
 0.1%   KLD:   0.000056
Minimum KLD:  -0.000033

====== Token probability statistics ======
Mean    Δp: -0.455 ± 0.091 %
Maximum Δp: 34.980%
99.9%   Δp: 21.574%
Median  Δp: -0.012%
Minimum Δp: -32.034%
RMS Δp    :  4.126 ± 0.186 %
Same top p: 88.480 ± 0.707 %
"""

READ = [
    "Mean PPL(Q)  ",
    "Mean PPL(base)",
    "Mean PPL(Q)/PPL(base)",
    "RMS",
    "Same top",
    *(line for line in OUTPUT.splitlines() if "KLD:" in line),
]


def test_every_number():
    found = parse.divergence(OUTPUT)
    assert found.kl == Estimate(0.023957, 0.001234)
    assert found.perplexity == Estimate(24.996685, 1.272165)
    assert found.reference == Estimate(24.400866, 1.239989)
    assert found.ratio == Estimate(1.024418, 0.005295)
    assert found.delta_p.value == pytest.approx(0.04126) and found.delta_p.error == pytest.approx(0.00186)
    assert found.top1.value == pytest.approx(0.8848) and found.top1.error == pytest.approx(0.00707)
    assert tuple(found.percentiles) == parse.PERCENTILES
    assert list(found.percentiles.values())[:6] == [
        1.771608,
        0.577886,
        0.191601,
        0.078939,
        0.046273,
        0.012352,
    ]
    assert found.percentiles["0.1%"] == 0.000056 and found.percentiles["Minimum"] == -0.000033


def test_what_is_no_number():
    text = OUTPUT.replace("0.023957 ±   0.001234", "     nan ±       -nan").replace(
        "4.126 ± 0.186", "  inf ± -nan"
    )
    found = parse.divergence(text)
    assert math.isnan(found.kl.value) and math.isnan(found.kl.error) and found.delta_p.value == math.inf


@pytest.mark.parametrize("start", READ)
def test_a_missing_line_is_an_error(start: str):
    lines = OUTPUT.splitlines(keepends=True)
    (line,) = [line for line in lines if line.startswith(start)]
    with pytest.raises(ParseError, match="no value of"):
        parse.divergence(OUTPUT.replace(line, ""))
    with pytest.raises(ParseError, match="no value of"):  # another form
        parse.divergence(OUTPUT.replace(line, line.replace(":", "=")))


def test_an_early_end_is_an_error():
    for end in range(0, len(OUTPUT) - 1, 7):
        with pytest.raises(ParseError):
            parse.divergence(OUTPUT[:end])
    with pytest.raises(ParseError, match="no statistics"):
        parse.divergence(OUTPUT[: OUTPUT.index("======")])


def test_final_estimate():
    log = "0.01.318.606 I perplexity: 1.09 seconds per pass - ETA 0.02 I Final estimate: PPL = 24.4008 +/- 1.23999\n"
    assert parse.perplexity(log) == Estimate(24.4008, 1.23999)
    assert parse.perplexity(log[: log.index("Final")]) is None


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_chunks_are_counted_however_the_output_is_cut(size: int):
    run = "0.03 minutes\n[1]23.0709,[2]-nan,[3]23.0632,\n"
    for pattern, output, last in ((parse.PERPLEXITY_CHUNK, run, 3), (parse.DIVERGENCE_CHUNK, OUTPUT, 2)):
        seen: list[int] = []
        chunks = parse.Chunks(pattern, seen.append)
        for i in range(0, len(output), size):
            chunks.feed(output[i : i + size])
        assert seen == list(range(1, last + 1)) and chunks.last == last
