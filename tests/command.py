"""Run the command line, in this process or in its own."""

import sys
from collections.abc import Callable
from typing import Final

import pytest
from attrs import define

from audiences_async.cli import app as cli

COMMAND: Final = [sys.executable, "-m", "audiences_async.cli"]
KEY: Final = "s3cr3t-k3y"


@define
class Done:
    """Exit code and output of a command."""

    returncode: int
    stdout: str
    stderr: str


def counted(stderr: str) -> str:
    """Return the beginning of a fetch's last line: its accounts."""
    return stderr.splitlines()[-1].partition(";")[0]


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Return a function that runs the command line in this process, with changes to the environment."""

    def command(*arguments: str, **changes: str) -> Done:
        with monkeypatch.context() as patch:
            for name, value in changes.items():
                patch.setenv(name, value)
            try:
                code = cli.run(list(arguments))
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else 1
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return command
