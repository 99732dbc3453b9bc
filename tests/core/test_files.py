"""Sizes as options say them, and as people read them."""

from __future__ import annotations

import pytest

from mobe_gguf.core.errors import UsageError
from mobe_gguf.core.files import describe_size, describe_sizes, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("50G", 50 * 10**9),
        ("50GB", 50 * 10**9),
        ("1.5G", 1_500_000_000),
        ("900K", 900_000),
        ("3kB", 3_000),
        ("1t", 10**12),
        (" 7m", 7_000_000),
        ("1 T", 10**12),
        (".5M", 500_000),
        ("4.6M", 4_600_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--o") == size
    assert parse_size(format_size(size), "--o") == size


@pytest.mark.parametrize(
    "text", ["50", "", "G", "0G", "0.0M", "0.0001K", "-1G", "1.G", "1,5G", "5GiB", "5B", "1e3M", "٣M", "nanM"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match=r"--o .*: expected a number and K, M, G or T \(powers of ten\)"):
        parse_size(text, "--o")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (500 * 10**6, "500M"),
        (1_500_000, "1.5M"),
        (900_000, "0.9M"),
        (1, "0.000001M"),
        (123_456_789_012, "123456.789012M"),
    ],
)
def test_sizes_as_commands_have_them(size: int, text: str) -> None:
    assert format_size(size) == text and parse_size(text, "--o") == size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (900, "900 B"),
        (4_610, "4.61 kB"),
        (4_612_345, "4.61 MB"),
        (12_500_000_000, "12.50 GB"),
        (1_234_500_000_000, "1,234.50 GB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert describe_size(size) == text


def test_sizes_that_differ_read_differently() -> None:
    assert describe_sizes(1_000_448, 1_000_000) == ("1.0004 MB", "1.0000 MB")
    assert describe_sizes(12_000_000_001, 12_000_000_000) == ("12.000000001 GB", "12.000000000 GB")
    assert describe_sizes(5_000, 5_000) == ("5.00 kB", "5.00 kB")
    assert describe_sizes(2_500_000, 1_000) == ("2.50 MB", "1.00 kB")
