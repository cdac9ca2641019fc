"""Importing this package, and its client, in a fresh interpreter, against importing aiohttp, tenacity and cattrs.

Run ``python benchmarks/imports.py [rounds] [--json FILE]``.
"""

import json
import os
import subprocess
import sys
from typing import Any

from common import arguments, report, save

BASELINE = "import aiohttp, tenacity, cattrs"
OURS = "import audiences_async"
CLIENT = "from audiences_async import AudiencesClient"  # names are imported when they are first used
OPTIONAL = ("rich", "cyclopts", "docket", "redis", "opentelemetry", "pytest", "uvloop", "orjson")
SHOWN = 15

_CHILD = """
import sys, time
wall, cpu = time.perf_counter(), time.process_time()
{statement}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
import json
print(json.dumps({{"wall": wall, "cpu": cpu, "modules": sorted(sys.modules)}}))
"""
_MARK = "-- ours --"


def child(*command: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that may keep bytecode, away from this folder."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run([sys.executable, "-P", *command], check=True, capture_output=True, text=True, env=kept)


def measured(statement: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(child("-c", _CHILD.format(statement=statement)).stdout)
    expected = [name.strip(",") for name in statement.partition(" import ")[0].split()[1:]]
    assert set(expected) <= set(found["modules"])
    return found


def check_optional(modules: list[str]) -> None:
    """No optional dependency is loaded, nor any part of one."""
    loaded = sorted({name.partition(".")[0] for name in modules} & set(OPTIONAL))
    assert not loaded, f"audiences_async loads {', '.join(loaded)}"
    print(f"none loaded of {', '.join(OPTIONAL)}; {len(modules)} modules in all")


def beyond(first: str) -> list[tuple[int, str]]:
    """What importing the client adds to this first: microseconds of its own and name, the slowest first."""
    code = f"{first}\nimport sys\nprint({_MARK!r}, file=sys.stderr, flush=True)\n{CLIENT}"
    lines = child("-X", "importtime", "-c", code).stderr.splitlines()
    entries = [line.removeprefix("import time:").split("|") for line in lines[lines.index(_MARK) + 1 :]]
    return sorted(((int(own), name.strip()) for own, _, name in entries), reverse=True)


def main() -> None:
    options = arguments(15)
    cases = (BASELINE, OURS, CLIENT)
    walls: dict[str, list[float]] = {name: [] for name in cases}
    cpus: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(options.rounds + 1):
        for name in cases:
            found = measured(name)
            if number:  # the first round warms up, and writes bytecode
                walls[name].append(found["wall"])
                cpus[name].append(found["cpu"])
    records = report("import, wall", BASELINE, walls, "ms", 1e3)
    records += report("import, CPU", BASELINE, cpus, "ms", 1e3)
    print()
    check_optional(measured(CLIENT)["modules"])
    added = beyond(BASELINE)
    print(f"\nbeyond aiohttp, tenacity and cattrs: {len(added)} modules, {sum(own for own, _ in added) / 1e3:.1f} ms")
    for own, name in added[:SHOWN]:
        print(f"{own / 1e3:9.2f} ms  {name}")
    save(options.json, records)


if __name__ == "__main__":
    main()
