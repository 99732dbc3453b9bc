"""The one exception that a user may see."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

import click


class MobeError(click.ClickException):
    """A failure that the user can understand and fix.

    The message says what is wrong and where, what was expected and what was found.  Where there is a next command to
    type, the message ends with it.  click prints it without a traceback and exits with ``exit_code``.
    """

    exit_code = 1


class UsageError(MobeError):
    """Wrong usage: the options contradict each other or the input (exit code 2)."""

    exit_code = 2


class Interrupted(MobeError):
    """Ctrl-C or SIGTERM ended the work; the message says what is kept and how to continue."""

    exit_code = 130


def one_line(error: BaseException, limit: int = 300) -> str:
    """What an error of other software says, in one line of at most ``limit`` characters."""
    return " ".join(str(error).split())[:limit]


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` as a separate program, such as a benchmark; handles errors and exits as ``mobe-gguf`` does."""
    try:
        sys.exit(main())
    except MobeError as e:
        e.show()
        sys.exit(e.exit_code)
