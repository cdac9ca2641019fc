"""The way imports go, and the page that shows it."""

import ast
import importlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import audiences_async

pytestmark = pytest.mark.once

PACKAGE = Path(audiences_async.__file__).parent
PAGE = PACKAGE / "help" / "architecture.md"
AIOHTTP = {"_http", "client", "sandbox"}  # the client names the type of a caller's session


def modules() -> Iterator[tuple[str, str, ast.Module]]:
    """Yield each module's name below the package, its part (a package, or itself at the root), and its tree."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        part = name.partition(".")[0]
        if part not in {"__init__", "_version", "pytest_plugin"}:
            yield name, part, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module, package: str) -> Iterator[str]:
    """Yield the names below *package* that a module imports anywhere, each with the modules above it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.partition(".")[2] for name in names if name.partition(".")[0] == package)


def imports() -> dict[str, set[str]]:
    """Return the parts of the package that each part imports."""
    found: dict[str, set[str]] = defaultdict(set)
    parts = {part for _, part, _ in modules()}
    for _, part, tree in modules():
        found[part] |= {name.partition(".")[0] for name in imported(tree, "audiences_async")} & parts - {part}
    return found


def picture() -> str:
    """Return the imports between the parts as a Mermaid flowchart, without those that follow from others."""
    found = imports()
    reachable: dict[str, set[str]] = {}
    lines = ["flowchart TD"]
    for part in TopologicalSorter(found).static_order():
        reachable[part] = set().union(*(reachable[other] | {other} for other in found[part]))
        direct = {
            other for other in found[part] if not any(other in reachable[third] for third in found[part] - {other})
        }
        lines += [f"    {part} --> {other}" for other in sorted(direct)]
    return "\n".join([lines[0], *sorted(lines[1:])])


def test_imports_go_one_way() -> None:
    """Order the parts so that each imports only parts before it; a cycle raises an error."""
    assert list(TopologicalSorter(imports()).static_order())


def test_modules_import_one_way() -> None:
    """Order the modules of each package in the same way."""
    names = {name for name, _, _ in modules()}
    found = {
        name: {
            other
            for target in imported(tree, "audiences_async")
            for other in (target, target.rpartition(".")[0])
            if other in names and other != name and not name.startswith(f"{other}.")
        }
        for name, _, tree in modules()
        if "TYPE_CHECKING" not in ast.unparse(tree)
    }
    assert list(TopologicalSorter(found).static_order())


def test_the_page_names_each_module() -> None:
    """Name each module of the library where the page says what is in its package."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    named = set(re.findall(r"`([\w.]+)`", "\n".join(rows)))
    private = {"_base", "_call", "_distributed", "_http", "_jobs", "_pace"}
    expected = {name.removeprefix(f"{part}.") if part in private else part for name, part, _ in modules()}
    assert sorted(expected - named) == []


def test_the_names_on_the_page_exist() -> None:
    """Find each name of the page that has a dot, such as `_call.decide.decide`, in the code."""
    names = set(re.findall(r"`(\w+(?:\.\w+)+)`", PAGE.read_text(encoding="utf-8")))
    assert "_call.decide.decide" in names
    assert [name for name in sorted(names) if not exists(name)] == []


def exists(name: str) -> bool:
    """Return whether a module of the package has that name, or something in one."""
    with suppress(ModuleNotFoundError):
        importlib.import_module(f"audiences_async.{name}")
        return True
    owner, _, last = name.rpartition(".")
    with suppress(ModuleNotFoundError):
        return hasattr(importlib.import_module(f"audiences_async.{owner}"), last)
    owner, _, cls = owner.rpartition(".")
    with suppress(ModuleNotFoundError):
        return hasattr(getattr(importlib.import_module(f"audiences_async.{owner}"), cls, None), last)
    return False


def test_only_the_wire_and_the_sandbox_import_aiohttp() -> None:
    """Keep aiohttp behind the transport."""
    users = {part for _, part, tree in modules() if any(True for _ in imported(tree, "aiohttp"))}
    assert users <= AIOHTTP


def test_the_picture_follows_the_imports() -> None:
    """Show on the architecture page what the code imports; `python tests/test_architecture.py` prints it anew."""
    assert f"```mermaid\n{picture()}\n```" in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.stdout.write(f"{picture()}\n")
