"""The commands together."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict

import click
import pytest
from click.testing import CliRunner

from mobe_gguf.cli import COMMANDS, main

#: Options that mean something else in each command.
DIFFERENT = {
    "--activation",
    "--bases",
    "--ctx",
    "--dtype",
    "--moments",
    "--quant",
    "--rank",
    "--seed",
    "--text",
    "-v",
}

#: Options that do more in one command.
MORE = {
    ("export", "--imatrix"),
    ("compress", "--device"),
    ("factorize", "--device"),
    ("moments", "--device"),
    ("factorize", "--target"),
    ("verify", "--layers"),
}


def test_names_that_are_not_utf8():
    """Refused before anything is done with them, by all commands."""
    for name in COMMANDS:
        result = CliRunner().invoke(main, [name, os.fsdecode(b"b\xff.gguf"), "out"])
        assert result.exit_code == 2 and "b\ufffd.gguf: this name is not UTF-8" in result.stderr, name


def test_options_of_several_commands_have_the_same_words():
    said = defaultdict(dict)
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        for option in command.params:
            if isinstance(option, click.Option) and (name, option.opts[0]) not in MORE:
                text = option.help.split("[default")[0].strip()
                said[option.opts[0]][name] = (tuple(option.opts), option.metavar, text)
    several = {option for option, commands in said.items() if len(commands) > 1}
    assert {"--json", "--quiet", "--dry-run", "--resume", "--layers", "--steps"} <= several
    assert {option for option in several if len(set(said[option].values())) > 1} == DIFFERENT


@pytest.mark.parametrize(
    ("name", "arguments", "at", "left"),
    [
        ("build", [], "mobe_gguf.cli.build.build", "stopped"),
        (
            "moments",
            ["m", "o", "--text", "t"],
            "mobe_gguf.calibrate.moments.collect",
            "stopped; finished layers are kept, --resume continues",
        ),
        (
            "export",
            ["m", "o", "--quant", "q4_k"],
            "mobe_gguf.export.write_model",
            "stopped; nothing was written",
        ),
        ("inspect", ["m"], "mobe_gguf.evaluate.inspect.describe", "stopped"),
        ("verify", ["m"], "mobe_gguf.evaluate.verify.verify", "stopped"),
        (
            "demo",
            ["d"],
            "mobe_gguf.studies.demo.run",
            "stopped. What is finished is kept in d; the same command resumes",
        ),
    ],
)
def test_an_interrupt_says_what_is_left(name, arguments, at, left, monkeypatch):
    def stop(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(at, stop)
    before = signal.getsignal(signal.SIGTERM)  # of Ray, where its tests ran in this process
    result = CliRunner().invoke(main, [name, *arguments])
    assert result.exit_code == 130 and result.stderr.startswith(f"Error: {left}")
    assert signal.getsignal(signal.SIGTERM) == before
