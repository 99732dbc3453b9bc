"""mobe_gguf/core/errors.py: how programs beside the command line end."""

from __future__ import annotations

import pytest

from mobe_gguf.core.errors import MobeError, UsageError, run_program


@pytest.mark.parametrize(
    "failure, code", [(MobeError("no file"), 1), (UsageError("no file"), 2), (None, 0), (7, 7)]
)
def test_programs_end_as_the_command_does(failure, code, capsys):
    def main():
        if isinstance(failure, MobeError):
            raise failure
        return failure

    with pytest.raises(SystemExit) as e:
        run_program(main)
    assert (e.value.code or 0) == code
    assert capsys.readouterr() == ("", "Error: no file\n" if isinstance(failure, MobeError) else "")
