"""The commands together."""

from __future__ import annotations

from collections import defaultdict

import click

from mobe_gguf.cli import COMMANDS, main

#: Options that mean something else in each command.
DIFFERENT = {"--activation", "--bases", "--dtype", "--quant", "--rank", "--text", "-v"}

#: Options that do more in one command.
MORE = {("export", "--imatrix"), ("factorize", "--device")}


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
