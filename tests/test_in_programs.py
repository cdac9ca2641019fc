"""Users' programs: failing callbacks, type checkers, other event loops, imports, files, Python versions."""

import asyncio
import itertools
import json
import linecache
import os
import random
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from redis.exceptions import RedisError
from services import missing_module

import audiences_async
from audiences_async import Account, AudiencesClient, CachePolicy, ConfigurationError, RetryPolicy
from audiences_async.accounts import AccountFile
from audiences_async.errors import InvalidResponseError, ServerError, StatusError, TransportError
from audiences_async.events import AttemptStarted, CallFinished, CallStarted
from audiences_async.sandbox import EXAMPLE_AUDIENCES, Answer, Sandbox, SteppedTime
from audiences_async.structuring import decode
from audiences_async.telemetry import OpenTelemetry

ROOT = Path(__file__).parent.parent
CALLS = ROOT / "tests" / "typing_api.py"
ONCE_MORE = RetryPolicy(max_attempts=2, base_delay=0)


class VaultDown(Exception):  # noqa: N818 - as others name theirs
    """An error of the program's own."""


class Flaky:
    """A limiter, and a key function, that returns or raises these one after the other, and then works."""

    def __init__(self, *given: Any) -> None:
        self.given = list(given)
        self.asked = 0

    def key(self) -> Any:
        """Return or raise the next value, and the key after the last."""
        self.asked += 1
        given = self.given.pop(0) if self.given else "the key"
        if isinstance(given, BaseException):
            raise given
        return given

    async def async_key(self) -> Any:
        """Do the same as `key`, after a turn of the event loop."""
        await asyncio.sleep(0)
        return self.key()

    async def acquire(self, account_name: str) -> None:
        """Let a request pass, or raise the next value."""
        await self.async_key()

    def use(self, way: str, sandbox: Sandbox, **settings: Any) -> tuple[AudiencesClient, Account]:
        """Create a client and an account that call it in one of the *WAYS*."""
        account = sandbox.add_account("north", api_key="the key")
        if way in {"rate_limit", "service_rate_limit"}:
            settings[way] = self
        else:
            account = Account("north", self.key if way == "key" else self.async_key)
        return AudiencesClient(base_url=sandbox.base_url, **settings), account


WAYS = ["rate_limit", "service_rate_limit", "key", "async key"]
PASSING = [ConnectionError, TimeoutError, OSError, RedisError, VaultDown]
MISTAKES = [TypeError(), ValueError(), LookupError(), KeyError(), AttributeError(), NameError(), ImportError()]
WRONG_KEYS = [None, "", 5, b"key", "a\nb"]


@pytest.mark.parametrize("cache", [None, CachePolicy(10.0)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", PASSING)
async def test_a_failure_that_may_pass(
    sandbox: Sandbox, time: SteppedTime, way: str, kind: type[Exception], cache: CachePolicy | None
) -> None:
    """Retry a transient failure after backoff, with nothing sent before; the last error names it."""
    flaky = Flaky(*[kind() for _ in range(5)])
    client, account = flaky.use(way, sandbox, clock=time.clock, retry=RetryPolicy(max_attempts=3), cache=cache)
    async with client:
        with pytest.raises(TransportError) as caught:
            await client.get_audiences(account)
        assert (caught.value.stop_reason, caught.value.account, flaky.asked) == ("attempts", "north", 3)
        assert type(caught.value.__cause__) is kind
        assert re.search(rf"({way}.acquire|API key function).* raised {kind.__name__}", str(caught.value))
        assert sandbox.requests == []
        assert len(await client.get_audiences(account)) == 2
    assert ([wait for wait in time.slept if wait], len(sandbox.requests)) == ([0.5, 1.0] * 2, 1)


@pytest.mark.parametrize(
    ("way", "given"), [*itertools.product(WAYS, MISTAKES), *itertools.product(WAYS[2:], WRONG_KEYS)]
)
async def test_a_mistake(sandbox: Sandbox, way: str, given: Any) -> None:
    """Raise ConfigurationError, as final, for a programming error in a limiter or key function, or an invalid key."""
    flaky = Flaky(given, given)
    client, account = flaky.use(way, sandbox, retry=ONCE_MORE)
    async with client:
        with pytest.raises(ConfigurationError) as caught:
            await client.get_audiences(account)
    assert (caught.value.stop_reason, flaky.asked, sandbox.requests) == ("final", 1, [])
    if isinstance(given, Exception):
        assert caught.value.__cause__ is given
        assert f"raised {type(given).__name__}" in str(caught.value)


@pytest.mark.parametrize("way", WAYS)
async def test_one_failure_concerns_one_call(sandbox: Sandbox, way: str) -> None:
    """Let a failure reach only one of five calls that wait in one lane, alone or in a job, and answer all."""
    flaky = Flaky(VaultDown())
    client, account = flaky.use(way, sandbox, retry=ONCE_MORE)
    async with client:
        answers = await asyncio.gather(*(client.get_audiences(account) for _ in range(5)))
        flaky.given.append(OSError())
        outcomes = await client.fetch_all([account] * 5)
    assert [len(answer) for answer in answers] == [2] * 5
    assert all(outcome.ok for outcome in outcomes)
    assert len(sandbox.requests) == 10


@pytest.mark.parametrize("cache", [None, CachePolicy(10.0)])
async def test_a_fresh_key_that_comes_late(sandbox: Sandbox, cache: CachePolicy | None) -> None:
    """Call a function again that fails when a 401 asks it for a fresh key."""
    flaky = Flaky("old", VaultDown())
    client, account = flaky.use("key", sandbox, retry=RetryPolicy(max_attempts=3, base_delay=0), cache=cache)
    async with client:
        assert len(await client.get_audiences(account)) == 2
    assert ([request.answer for request in sandbox.requests], flaky.asked) == ([401, 200], 3)


ODD_NAMES = ['"', "'", "\\", "\0", "\n", "\r\n", "\0extra", "audiences_async:extra", "extra", "", "{0}", "%s", "ключ"]


def test_odd_fields_are_kept() -> None:
    """Keep a field of the service in `extra` under its own name, whatever its characters."""
    odd = {name: number for number, name in enumerate(ODD_NAMES)}
    body = json.dumps({"status": "200", "data": [{**row, **odd} for row in EXAMPLE_AUDIENCES]}).encode()
    assert [audience.extra for audience in decode(body)] == [odd, odd]  # type: ignore[union-attr]


def test_generated_code_has_no_control_characters() -> None:
    """Compile the code that cattrs generates with any version of cattrs: nothing in it needs escaping."""
    with pytest.raises(InvalidResponseError):
        decode(b'{"status": "200", "data": [{"type": "Static"}]}')  # the detailed pass has its own hooks
    generated = [name for name in linecache.cache if "cattrs" in name and "audiences_async" in name]
    sources = ["".join(linecache.getlines(name)) for name in generated]
    assert len(sources) >= 2
    for source in sources:
        assert re.search(r"[\x00-\x08\x0b-\x1f\x7f]|\\[0xnru]", source) is None, source


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Return a folder with the programs of README and the pages, twice: for basic mode and for strict mode."""
    pages = [ROOT / "README.md", *sorted((Path(audiences_async.__file__).parent / "help").glob("*.md"))]
    found = [text for page in pages for text in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)]
    texts: list[str] = []
    for text in found:
        if any(f"import {name}\n" in text and missing_module(name) for name in ("duckdb", "polars")):
            continue  # 500 MB with pyarrow: a newcomer need not have them
        is_addition = "@app." in text and "app = " not in text  # to the program before
        texts.append(texts[-1] + text if is_addition else text)
    for mode, (number, text) in itertools.product(("basic", "strict"), enumerate(texts)):
        (tmp_path / mode).mkdir(exist_ok=True)
        (tmp_path / mode / f"program_{number}.py").write_text(text, encoding="utf-8")
    package = str(Path(audiences_async.__file__).parent.parent)
    settings = {"typeCheckingMode": "basic", "include": ["basic", "strict"], "strict": ["strict"]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({**settings, "extraPaths": [package]}))
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("checker", ["pyright", "mypy"])
@pytest.mark.once
@pytest.mark.long
def test_type_checkers_accept_the_programs_of_readme(programs: Path, checker: str) -> None:
    """Pyright, basic and strict, and mypy accept README's programs; mypy refuses each wrong call of typing_api.py."""
    if find_spec(checker) is None and not os.environ.get("CI"):
        pytest.skip(f"{checker} is not installed")
    options = {
        "pyright": ["-p", str(programs), "--pythonpath", sys.executable],
        "mypy": ["--strict", f"--cache-dir={os.devnull}", str(programs / "strict"), str(CALLS)],
    }
    command = [sys.executable, "-m", checker, *options[checker]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


async def enter(client: AudiencesClient) -> None:
    """Enter and leave a client."""
    async with client:
        pass


async def ask(client: AudiencesClient) -> None:
    """Make a call."""
    await client.get_audiences()


async def stream(client: AudiencesClient) -> None:
    """Start a job."""
    async with client.stream([Account("north", "key")]):
        pass


def drive(program: Coroutine[Any, Any, object]) -> None:
    """Run a coroutine as trio does: without a running asyncio event loop."""
    try:
        program.send(None)
    except StopIteration:
        pass
    finally:
        program.close()


@pytest.mark.parametrize("program", [enter, ask, stream])
def test_without_asyncio(program: Callable[[AudiencesClient], Coroutine[Any, Any, None]]) -> None:
    """Raise ConfigurationError for every use on another event loop than asyncio's, with that reason."""
    for cache in (None, CachePolicy(10.0)):
        with pytest.raises(ConfigurationError, match="asyncio"):
            drive(program(AudiencesClient("key", cache=cache)))


def test_closing_without_asyncio() -> None:
    """Refuse to close a client elsewhere that asyncio has used; an unused one has nothing to close."""
    client = AudiencesClient("key")
    with asyncio.Runner() as runner:
        runner.run(client.__aenter__())
        with pytest.raises(ConfigurationError, match="asyncio"):
            drive(client.aclose())
        runner.run(client.aclose())
    drive(AudiencesClient("key").aclose())


def test_histograms_tell_times_apart() -> None:
    """Put times of 5 ms, 50 ms, 0.5 s, 2 s and 20 s in separate buckets without a view of the user's."""
    reader = InMemoryMetricReader()
    meters = MeterProvider([reader])
    hook = OpenTelemetry(meter_provider=meters)
    for seconds in (0.005, 0.05, 0.5, 2.0, 20.0):
        hook(CallStarted("north"))
        hook(AttemptStarted("north", 1, seconds))
        hook(CallFinished("north", 1, seconds, None))
    data = json.loads(reader.get_metrics_data().to_json())  # type: ignore[union-attr]
    meters.shutdown()
    metrics = data["resource_metrics"][0]["scope_metrics"][0]["metrics"]
    points = {metric["name"]: metric["data"]["data_points"] for metric in metrics}
    for name in ("audiences.client.call.duration", "audiences.client.pacing.wait"):
        (point,) = points[name]
        assert sorted(point["bucket_counts"], reverse=True)[:6] == [1, 1, 1, 1, 1, 0], name
        assert sum(bound < 1.0 for bound in point["explicit_bounds"]) >= 5, name


def printed(code: str, **environment: str) -> str:
    """Return the output of a Python that runs only this code."""
    command = [sys.executable, "-W", "error", "-c", code]
    paths = {"PYTHONPATH": str(Path(audiences_async.__file__).parent.parent)}
    changed = {**os.environ, **paths, **environment}
    done = subprocess.run(command, env=changed, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip().splitlines()[-1]


HEAVY = ("aiohttp", "cattrs", "tenacity", "msgspec", "audiences_async.client", "audiences_async.sandbox")


@pytest.mark.slow
def test_the_pytest_plugin_imports_little(tmp_path: Path) -> None:
    """Import none of the fixtures' dependencies in a test run that uses none of them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    plugin = project["entry-points"]["pytest11"]["audiences_async"]
    (tmp_path / "test_empty.py").write_text("def test_empty():\n    pass\n")
    options = ["-q", "-p", plugin, "-p", "no:cacheprovider", f"--rootdir={tmp_path}", "-c", os.devnull, str(tmp_path)]
    code = f"import pytest, sys; assert pytest.main({options}) == 0; print([n for n in {HEAVY} if n in sys.modules])"
    assert printed(code, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", PYTEST_ADDOPTS="") == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("code", ["import audiences_async", "import audiences_async as a; dir(a); hasattr(a, 'no')"])
def test_an_import_brings_little(code: str) -> None:
    """Import the package alone without aiohttp and cattrs; its names load on first use."""
    assert printed(f"{code}; import sys; print([n for n in {HEAVY} if n in sys.modules])") == "[]"


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "from audiences_async import AudiencesClient; print(AudiencesClient.__name__ == 'AudiencesClient')",
        "from audiences_async import *; print(AudiencesClient.__name__ == 'AudiencesClient' and Outcome is not None)",
        "import audiences_async as a; print(set(a.__all__) <= set(dir(a)) and all(getattr(a, n) for n in a.__all__))",
        "import audiences_async as a; print(not hasattr(a, 'no'))",
        "import audiences_async as a; print(a.errors.ServerError is a.ServerError)",
        "import audiences_async as a; print(a.events.Event is a.Event and a.models.Account is a.Account)",
        "import audiences_async as a; print(a.structuring.decode.__module__ == 'audiences_async.structuring')",
        "import audiences_async.client as c, audiences_async as a; print(c.Account is a.Account)",
    ],
)
@pytest.mark.measured
def test_names_come_on_first_use(code: str) -> None:
    """Load the public names and modules in any order of first use."""
    assert printed(code) == "True"


DIGITS = "1" * 5_000


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("a.ndjson", f'{{"name": "n", "api_key": "k", "note": {DIGITS}}}', "line 1"),
        ("a.ndjson", f'{{"name": "n", "api_key": "k"}}\n{{"name": -{DIGITS}}}', "line 2"),
        ("a.jsonl", f"{DIGITS}", "line 1"),
        ("a.ndjson", '{"name": "n", "api_key_env": "\\ud800"}', "line 1, column 15 (api_key_env)"),
        ("a.ndjson", '{"name": "n", "api_key_env": "A\\u0000B"}', "line 1, column 15 (api_key_env)"),
        ("a.ndjson", '{"name": "n", "api_key_env": "A=B"}', "line 1, column 15 (api_key_env)"),
        ("a.csv", "name,api_key_env\nn,A=B\n", "line 2, column 2 (api_key_env)"),
        ("a.csv", "name,api_key_env\nn,A\0B\n", "line 2"),
        ("a.csv", f"name,api_key\nn,{'k' * 200_000}\n", "line 2"),
        ("a.toml", f'[[accounts]]\nname = "n"\napi_key = "k"\nnote = {DIGITS}', "a.toml"),
        ("a.toml", '[[accounts]]\nname = "n"\napi_key_env = "A\\u0000B"', "line 3, column 1 (api_key_env)"),
        ("a.toml", '[[accounts]]\nname = "n"\napi_key_env = "A=B"', "line 3, column 1 (api_key_env)"),
    ],
)  # fmt: skip
def test_odd_values_in_accounts_files(tmp_path: Path, name: str, text: str, place: str) -> None:
    """Raise ConfigurationError with the place of a value that Python itself cannot hold, like any other."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError) as caught:
        AccountFile(tmp_path / name)
    assert place in str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".ndjson", ".jsonl", ".toml"])
def test_odd_paths_of_accounts_files(tmp_path: Path, suffix: str) -> None:
    """Raise ConfigurationError for an invalid path, and show it on one line."""
    (tmp_path / f"folder{suffix}").mkdir()
    (tmp_path / f"loop{suffix}").symlink_to(tmp_path / f"loop{suffix}")
    for name in ("folder", "loop", "a\0b", "\ud800", "x" * 5_000, "none/none"):
        with pytest.raises(ConfigurationError, match="cannot be read: ") as caught:
            AccountFile(tmp_path / f"{name}{suffix}")
        assert str(caught.value).isprintable()


FILES = {
    ".csv": b'name,api_key,api_key_env\nn,k,\n"m, ""m""",,HOME\n',
    ".ndjson": b'{"name": "n", "api_key": "k", "note": [1]}\n{"name": "m", "api_key_env": "HOME"}\n',
    ".toml": b'[[accounts]]\nname = "n"\napi_key = "k"\n\n[[accounts]]\nname = "m"\napi_key_env = "HOME"\nx = 1.5\n',
}
FRAGMENTS = [
    b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b"'", b'"""', b"\\", b"\\ud800", b"\\u0000", b"\n",
    b"\r", b"", b",", b"=", b"[", b"]", b"{", b"}", b"[[", b"#", b"1e999", b"0x", b"nan", b"NaN", b"null", b"1" * 5_000,
    b"[" * 5_000, b'{"a":' * 5_000, b"k" * 200_000, b"2025-13-40", b"accounts", b"api_key", b"api_key_env", b"name",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FILES)
def test_mangled_accounts_files(tmp_path: Path, chance: random.Random, suffix: str) -> None:
    """Read any content of an accounts file, or raise ConfigurationError."""
    file = tmp_path / f"a{suffix}"
    read = 0
    for _ in range(300):
        text = FILES[suffix]
        for _ in range(chance.randint(1, 4)):
            start = chance.randrange(len(text) + 1)
            end = min(len(text), start + chance.choice([0, 0, 1, 5, 40]))
            text = text[:start] + chance.choice([*FRAGMENTS, text[start:end] * 2]) + text[end:]
        file.write_bytes(text)
        try:
            read += len(list(AccountFile(file)))
        except ConfigurationError as error:
            assert str(file) in str(error)
    assert read > 0


def reply(created: str, **more: Any) -> bytes:
    """Return a 200 with one audience of that time."""
    row = {**EXAMPLE_AUDIENCES[1], "created_time": created, **more}
    return json.dumps({"status": "200", "response_time": created, "data": [row]}).encode()


@pytest.mark.parametrize("more", [{}, {"beyond": 1}])
@pytest.mark.parametrize(
    "time",
    [
        "2025-10-01T24:00:00Z", "2025-10-01T24:00Z", "2025-10-01T23:59:60Z", "2025-10-01T23:60:00Z", "2025-10-01",
        "2025-10-01T09:10:00+24:00", "2025-10-01T09:10:00-24:00", "2025-10-01T09:10:00+25:00", "2025-W40-3T09:10:00Z",
        "2025-10-01T09:10:00+00:60", "2025-274T09:10:00Z", "20251001T091000Z", "2025-10-01T09Z", "2025-02-30T09:10:00Z",
        "2025-10-01T09:10:00,5Z", "0000-01-01T00:00:00Z", "0001-01-01T00:00:00+01:00", "9999-12-31T23:59:59-01:00",
    ],
)  # fmt: skip
def test_a_time_that_is_none(time: str, more: dict[str, Any]) -> None:
    """Report an invalid date and time as a problem, plain or not, and as no `response_time`, on every Python."""
    with pytest.raises(InvalidResponseError) as caught:
        decode(reply(time, **more))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["$.data[0].created_time"]
    envelope = json.dumps({"status": "200", "response_time": time, "data": [{**EXAMPLE_AUDIENCES[1], **more}]})
    assert decode(envelope.encode()).response_time is None


@pytest.mark.parametrize(
    ("hosts", "problem"),
    [
        ("[::ffff:127.0.0.1] [::ffff:7f00:1] [::FFFF:127.9.9.9] 127.0.0.2 [::1]", None),
        ("[::ffff:10.0.0.1] [::ffff:0:127.0.0.1] [64:ff9b::7f00:1] 0.0.0.0 [::]", "allow_http"),
    ],
)
def test_loopback_addresses(hosts: str, problem: str | None) -> None:
    """Plain HTTP may go to a loopback address in any notation, and to no other, on every Python."""
    for host in hosts.split():
        with pytest.raises(ConfigurationError, match=problem) if problem else nullcontext():
            AudiencesClient("key", base_url=f"http://{host}:8080/")


PHRASES = {413: "Content Too Large", 414: "URI Too Long", 416: "Range Not Satisfiable", 422: "Unprocessable Content"}


@pytest.mark.parametrize(("status", "phrase"), PHRASES.items())
async def test_reason_phrases(sandbox: Sandbox, north: Account, status: int, phrase: str) -> None:
    """Messages, and the sandbox's responses, have RFC 9110's reason phrases on every Python."""
    sandbox.script("north", Answer(status, b""), Answer(status))
    async with AudiencesClient(base_url=sandbox.base_url) as client:
        for described in ("", f": {phrase}"):
            with pytest.raises(StatusError) as caught:
                await client.get_audiences(north)
            assert caught.value.message == f"HTTP {status} {phrase}{described}"


@pytest.mark.parametrize("begin", ["[", '{"a": '])
async def test_a_deep_value(sandbox: Sandbox, north: Account, begin: str) -> None:
    """Keep 150 levels in an undocumented field, report 1,000 as a problem, and ignore those of an error body."""

    def body(depth: int, kind: str) -> str:
        value = begin * depth + "1" + ("]" if begin == "[" else "}") * depth
        row = json.dumps({**EXAMPLE_AUDIENCES[1], "type": kind})
        return f'{{"status": "200", "data": [{row[:-1]}, "beyond": {value}}}]}}'

    for kind in ("Dynamic", "New"):
        (audience,) = decode(body(150, kind).encode())
        kept = audience.raw if kind == "New" else audience.extra  # type: ignore[union-attr]
        assert json.dumps(kept["beyond"]).count(begin) == 150
        with pytest.raises(InvalidResponseError) as caught:
            decode(body(1_000, kind).encode())
        assert "nested too deeply" in caught.value.problems[0]
    sandbox.script("north", Answer(500, body(1_000, "New")))
    async with AudiencesClient(base_url=sandbox.base_url, retry=RetryPolicy(1)) as client:
        with pytest.raises(ServerError, match="HTTP 500"):
            await client.get_audiences(north)
