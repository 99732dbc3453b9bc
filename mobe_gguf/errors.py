"""The one exception that a user may see."""

from __future__ import annotations

import click


class MobeError(click.ClickException):
    """A failure that the user can understand and mend.

    The message says what is wrong, where, what was expected and what was found, and ends with the next
    command to type where there is one.  click prints it without a traceback and exits with ``exit_code``.
    """

    exit_code = 1


class UsageError(MobeError):
    """Wrong usage: the options contradict each other or the input (exit code 2)."""

    exit_code = 2
