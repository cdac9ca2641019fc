"""Docstrings: their examples run as printed."""

import ast
import inspect
import re
import textwrap
from collections.abc import Awaitable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

import audiences_async
from audiences_async import AudiencesClient, RetryPolicy
from audiences_async.sandbox import Answer, Sandbox

ROOT: Final = Path(audiences_async.__file__).parent
EXAMPLE: Final = re.compile(r"::\n\n((?: {4}.*\n|\n)+)")


def examples() -> Iterator[Any]:
    """Yield the code of each indented block that follows a double colon, and its place."""
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                place = f"{file.stem}.{getattr(node, 'name', '')}"
                for found in EXAMPLE.finditer(f"{ast.get_docstring(node)}\n"):
                    yield pytest.param(textwrap.dedent(found[1]), id=place)


EXAMPLES: Final = list(examples())


def test_examples_are_found() -> None:
    """Find the client's own example among those that run."""
    assert "client.AudiencesClient" in {example.id for example in EXAMPLES}


@pytest.mark.parametrize("code", EXAMPLES)
async def test_an_example_runs(code: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run an example with the names that its docstring mentions."""
    monkeypatch.setenv("AUDIENCES_BASE_URL", sandbox.base_url)
    at_once = partial(AudiencesClient, retry=RetryPolicy(base_delay=0))
    sandbox.add_account("default", api_key="api-key")
    async with at_once("api-key") as client:
        names = {"Answer": Answer, "AudiencesClient": at_once, "RetryPolicy": RetryPolicy, "Sandbox": Sandbox}
        names |= {"client": client, "sandbox": sandbox}
        compiled = compile(code, "example", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        running: Awaitable[None] | None = eval(compiled, {**names, "accounts": [sandbox.add_account("north")]})
        if inspect.isawaitable(running):
            await running
