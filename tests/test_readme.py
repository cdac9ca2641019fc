"""README and the pages: their programs run, and their tables are true."""

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import attrs
import pytest
from command import counted, runner
from services import missing, redis_server

import audiences_async
from audiences_async import (
    Account,
    AudiencesClient,
    CachePolicy,
    Failed,
    RetryBudget,
    RetryPolicy,
    errors,
    events,
    telemetry,
)
from audiences_async._jobs.account_rows import KEY_FIELDS
from audiences_async._jobs.outcome_files import line
from audiences_async.cli import app, exits
from audiences_async.cli.rows import COLUMNS, TIMES
from audiences_async.cli.target import FileFormat
from audiences_async.distributed import QUEUE
from audiences_async.errors import AudiencesError, status_error
from audiences_async.events import Event
from audiences_async.sandbox import Answer, Sandbox

pytestmark = pytest.mark.once

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in (Path(audiences_async.__file__).parent / "help").glob("*.md")
}
PROGRAM = re.compile(r"```python\n(.*?)```", re.DOTALL)
MEASURED = [("Rate limits",), ("How near it comes", PAGES["limits"])]
TABLE_ROW = re.compile(r"^\| `(\w+)` \| ([^|]+) \|", re.MULTILINE)


def section(title: str, text: str = README) -> str:
    """Return the text of a section of README, or of another text."""
    return text.split(f"# {title}\n")[1].split("\n## ", maxsplit=1)[0]


def program(title: str) -> str:
    """Return the program of a section of README."""
    programs: list[str] = PROGRAM.findall(section(title))
    return programs[0]


def program_of(topic: str, number: int = 0) -> str:
    """Return a program of a page, by its number."""
    programs: list[str] = PROGRAM.findall(PAGES[topic])
    return programs[number]


def run(program: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run a program with warnings as errors."""
    file = tmp_path / "program.py"
    file.write_text(program)
    return subprocess.run(
        [sys.executable, "-W", "error", file], capture_output=True, text=True, timeout=50, check=False
    )


@pytest.mark.slow
def test_the_first_program_runs_as_printed(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pasted into a file, the first program lists the audiences of AUDIENCES_BASE_URL."""
    monkeypatch.setenv("AUDIENCES_BASE_URL", sandbox.base_url)
    monkeypatch.setenv("AUDIENCES_API_KEY", str(sandbox.add_account().api_key))
    done = run(program("audiences_async"), tmp_path)
    assert done.stderr == ""
    assert done.stdout == "31234 Static NE_USA-above50\n45412 Dynamic VIP\n"


@pytest.mark.slow
def test_the_job_over_a_file_runs_as_printed(sandbox: Sandbox, tmp_path: Path) -> None:
    """The shell commands fetch two accounts of a file, with keys in it and in the environment."""
    (commands,) = re.findall(r"```sh\n(cat > accounts.*?)```", README, re.DOTALL)
    for name in ("north", "south"):
        sandbox.add_account(name, api_key=f"key-of-{name}")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "AUDIENCES_BASE_URL": sandbox.base_url}
    done = subprocess.run(
        ["sh", "-e", "-c", commands],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    counts = [line.partition(";")[0] for line in done.stderr.splitlines()]
    assert (done.stdout, counts) == ("", ["2 of 2 accounts fetched, 0 failed"] * 2)
    assert len((tmp_path / "audiences.ndjson").read_text().splitlines()) == len(sandbox.requests) == 2


@pytest.mark.slow
def test_the_program_for_many_accounts_runs_as_printed(tmp_path: Path) -> None:
    """The program prints two answers and one error, in any order."""
    done = run(program("Many accounts, one client"), tmp_path)
    south, east, north = sorted(done.stdout.splitlines())
    assert (north, east, done.stderr) == ("north 2", "east 2", "")
    assert south.startswith("account 'south': HTTP 401 Unauthorized")


@pytest.fixture
def two_accounts(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment of the programs for a worker."""
    monkeypatch.setenv("AUDIENCES_BASE_URL", sandbox.base_url)
    for name in ("north", "south"):
        monkeypatch.setenv(f"{name.upper()}_KEY", str(sandbox.add_account(name).api_key))


@pytest.mark.slow
@pytest.mark.skipif(missing("redis-server"), reason="redis-server is not installed")
@pytest.mark.usefixtures("two_accounts")
def test_a_client_in_a_docket_worker_runs_as_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Under Docket one client serves the tasks of a worker and is closed with it."""
    folder = tmp_path / "redis"
    folder.mkdir()
    with redis_server(folder) as url:
        monkeypatch.setenv("REDIS_URL", url)
        done = run(program("In a worker"), tmp_path)
    assert (sorted(done.stdout.splitlines()), done.stderr) == (["north 2", "south 2"], "")


@pytest.mark.slow
@pytest.mark.usefixtures("two_accounts")
def test_a_client_in_a_taskiq_worker_runs_as_printed(tmp_path: Path) -> None:
    """Under taskiq's hooks one client serves the tasks of a worker and is closed with it."""
    done = run(program_of("workers", 1), tmp_path)
    assert (done.stdout, done.stderr) == ("[2, 2]\n", "")


@pytest.mark.slow
@pytest.mark.skipif(missing("redis-server"), reason="redis-server is not installed")
def test_several_machines_as_printed(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first command starts a worker, the second one has it fetch every account of the file; the third one looks."""
    (commands,) = re.findall(r"```sh\n.*?\n(audiences worker.*?)```", PAGES["many-machines"], re.DOTALL)
    account = sandbox.add_account("north")
    (tmp_path / "accounts.csv").write_text(f"name,api_key\nnorth,{account.api_key}\n")
    monkeypatch.setenv("AUDIENCES_BASE_URL", sandbox.base_url)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    with redis_server(tmp_path) as url:
        printed = commands.replace("redis://host:6379", url).replace("s3://bucket", str(tmp_path))
        worker, fetch, status = (shlex.split(line) for line in printed.splitlines())
        with subprocess.Popen(worker, cwd=tmp_path) as process:
            done = subprocess.run(fetch, cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False)
            shown = subprocess.run([*status, "--json"], capture_output=True, text=True, timeout=50, check=True)
            process.terminate()
    assert len(json.loads(shown.stdout)["workers"]) == 1
    assert (done.returncode, counted(done.stderr)) == (0, "1 of 1 accounts fetched, 0 failed")
    assert '"account":"north","ok":true' in (tmp_path / "audiences.ndjson").read_text()


@pytest.mark.slow
def test_the_program_of_rate_limits_runs_as_printed(tmp_path: Path) -> None:
    """The program learns a rate with few extra requests."""
    done = run(program_of("limits"), tmp_path)
    requests, snapshot = done.stdout.splitlines()
    assert done.stderr == ""
    assert 100 <= int(requests.split()[0]) <= 130
    assert "AccountPace(account='north'" in snapshot


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plugins", "before"),
    [
        (("-p", "no:aiohttp", "-p", "no:anyio", "--asyncio-mode=auto"), ""),
        (("-p", "no:aiohttp", "-p", "no:asyncio"), "import pytest\npytestmark = pytest.mark.anyio\n"),
        (("-p", "no:anyio", "--asyncio-mode=auto"), ""),
    ],
    ids=["pytest-asyncio", "anyio", "pytest-aiohttp"],
)
def test_the_tests_run_as_printed(pytester: pytest.Pytester, plugins: tuple[str, ...], before: str) -> None:
    """README's examples of a user's tests pass, with each of the plugins in use."""
    pytester.makeconftest("import pytest\n@pytest.fixture\ndef anyio_backend(): return 'asyncio'\n")
    pytester.makepyfile(test_readme=before + program("Testing your own code"), test_page=before + program_of("testing"))
    unused = [f"-pno:{name}" for name in ("cacheprovider", "faker", "hypothesispytest", "schemathesis", "xdist")]
    result = pytester.runpytest_subprocess(*unused, *plugins)
    result.assert_outcomes(passed=2 + 7)


def test_every_program_is_run() -> None:
    """Every program of README and the pages is tested here, in test_web.py or in test_job_files.py."""
    here = {"agents": 1, "jobs": 1, "limits": 1, "many-machines": 1, "telemetry": 2, "testing": 1, "workers": 2}
    assert {topic: count for topic, text in PAGES.items() if (count := len(PROGRAM.findall(text)))} == here | {"web": 9}
    assert len(PROGRAM.findall(README)) == 5
    assert program("In a worker") == program_of("workers")


def test_the_defaults_are_true() -> None:
    """The tables of settings name every argument, with its real default."""
    shown = dict(TABLE_ROW.findall(section("Settings")))
    parameters = inspect.signature(AudiencesClient).parameters
    policy = {field.name: field.default for field in attrs.fields(RetryPolicy)}
    assert set(shown) == set(parameters) - {"allow_http"} | {"RetryPolicy"} | set(policy)
    budget = {
        name: float(value)
        for name, value in TABLE_ROW.findall(section("The retry budget", PAGES["limits"]))
        if value.isdigit()
    }
    assert budget == {field.name: field.default for field in attrs.fields(RetryBudget)}
    cache = dict(TABLE_ROW.findall(section("A cache", PAGES["web"])))
    for field in attrs.fields(CachePolicy):
        assert cache[field.name] == ("required" if field.default is attrs.NOTHING else str(field.default))
    assert len(cache) == 1 + len(attrs.fields(CachePolicy))
    for name in ("timeout", "attempt_timeout", "max_body_bytes"):
        assert float(shown[name]) == parameters[name].default
    for name in ("max_attempts", "base_delay", "max_delay", "throttle_base_delay"):
        assert float(shown[name]) == policy[name]
    assert {int(status) for status in shown["statuses"].split(",")} == policy["statuses"]


def test_the_table_of_replies_names_real_errors() -> None:
    """README has each error that a response can raise, with the error's own hint."""
    rows = re.findall(r"^\| .+ \| `(\w+Error)`[^|]* \| .* \| (.+) \|$", section("What can go wrong"), re.MULTILINE)
    every = {name for name in audiences_async.__all__ if name.endswith("Error")}
    assert every - {name for name, _ in rows} == {
        "AudiencesError", "ConfigurationError", "ClientClosedError", "TransportError"
    }  # fmt: skip
    for name, advice in rows:
        hint = getattr(errors, name).hint
        assert issubclass(getattr(audiences_async, name), AudiencesError)
        assert advice == (hint or advice)


def test_what_can_go_wrong_is_the_whole_tree() -> None:
    """The page has each error once, in the order of the tree, with the error's own hint."""
    shown = section("What can go wrong, and what you get", PAGES["errors"])
    rows = re.findall(r"^\| `(\w+)` \| .+ \| (.+) \|$", shown, re.MULTILINE)
    public = [name for name in audiences_async.__all__ if name.endswith("Error") and name != "AudiencesError"]
    tree = str(errors.__doc__)
    assert [name for name, _ in rows] == sorted(public, key=tree.index)
    for name, advice in rows:
        assert advice == (getattr(errors, name).hint or advice)


@pytest.mark.slow
def test_the_program_of_the_cache_runs_as_printed(tmp_path: Path) -> None:
    """500 concurrent calls make one request."""
    done = run(PROGRAM.findall(section("A cache", PAGES["web"]))[0], tmp_path)
    assert (done.stdout, done.stderr) == ("1 request for 500 answers\n", "")


@pytest.mark.slow
def test_the_program_of_telemetry_runs_as_printed(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The instrumented program prints the answer."""
    monkeypatch.setenv("AUDIENCES_BASE_URL", sandbox.base_url)
    monkeypatch.setenv("AUDIENCES_API_KEY", str(sandbox.add_account().api_key))
    done = run(program_of("telemetry", 1), tmp_path)
    assert (done.stdout, done.stderr) == ("2\n", "")


@pytest.mark.slow
def test_the_program_that_counts_events_runs_as_printed(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The program prints one answer and the two requests that it took."""
    monkeypatch.setenv("AUDIENCES_BASE_URL", sandbox.base_url)
    monkeypatch.setenv("AUDIENCES_API_KEY", str(sandbox.add_account("north").api_key))
    sandbox.script("north", Answer(503))
    done = run(program_of("telemetry"), tmp_path)
    assert (done.stdout, done.stderr) == ("{'requests': 2, 'answers': 1}\n", "")


def test_the_table_of_events_is_true() -> None:
    """The page about telemetry has every event, with its own fields in order."""
    shown: dict[str, list[str]] = {}
    for kinds, fields in re.findall(r"^\| (`[A-Z].*?) \|(.*)\|$", PAGES["telemetry"], re.MULTILINE):
        for kind in re.findall(r"`(\w+)`", kinds):
            shown[kind] = re.findall(r"`(\w+)`", fields)
    every = {kind.__name__ for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event)}
    assert shown.keys() == every - {"Event"}
    assert shown.pop("AttemptFinished") == ["attempt", *(field.name for field in attrs.fields(events.Attempt))]
    for kind, names in shown.items():
        own = [field.name for field in attrs.fields(getattr(events, kind)) if not field.inherited]
        assert [name for name in names if name in own] == own


def test_the_metrics_are_named() -> None:
    """The page about telemetry names each metric."""
    named = set(re.findall(r"`(audiences\.client\.[a-z.]+)`", PAGES["telemetry"]))
    assert named == set(re.findall(r"``(audiences\.client\.[a-z.]+)``", str(telemetry.OpenTelemetry.__doc__)))


def test_the_tables_of_job_files_are_true() -> None:
    """The page about jobs has the formats, the keys of an account and of a line, and the columns with their types."""
    page = PAGES["jobs"]
    assert {*re.findall(r"^\| `(\w+)(?: --rows)?` \|", page, re.MULTILINE)} >= {*get_args(FileFormat)}
    assert tuple(re.findall(r"^- `(\w+)`: ", page, re.MULTILINE)) == KEY_FIELDS
    shown = json.loads(line(Failed(Account("north", "key"), 0.0, status_error(500, ""))))
    keys = re.findall(r"^\| `(\w+)` \|", page.split("| key |")[1].split("\n\n")[0], re.MULTILINE)
    assert keys == list(shown)
    assert set(shown["error"]) == set(re.findall(r"`(\w+)`", page.split("an object with")[1].split(" |")[0]))
    types = dict.fromkeys(COLUMNS, "string") | dict.fromkeys(TIMES, "timestamp") | {"user_count": "64-bit integer"}
    assert dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", page.split("| column |")[1], re.MULTILINE)) == types


def test_the_options_of_a_worker_are_true() -> None:
    """The page about many machines has the real default of each option of a worker."""
    parameters = inspect.signature(app.worker).parameters
    rows = re.findall(r"^\| `worker` \| `--([\w-]+)` \| (.*?) ?\|", PAGES["many-machines"], re.MULTILINE)
    assert len(rows) == 6
    special = {inspect.Parameter.empty: "", None: "learned"}
    for option, default in rows:
        real = parameters[option.replace("-", "_")].default
        assert default == (f"{real:g} s" if isinstance(real, float) else special.get(real, str(real)))
    assert f"| `{QUEUE}` |" in PAGES["many-machines"]


def test_every_stop_reason_is_named() -> None:
    """The page about errors explains each reason to stop."""
    assert set(get_args(events.StopReason)) <= set(re.findall(r'`"(\w+)"`', PAGES["errors"]))


def test_the_measured_table_is_the_same_on_the_page() -> None:
    """README and the page about limits have the same figures."""
    tables = [re.findall(r"^\| .*", section(*where), re.MULTILINE) for where in MEASURED]
    assert len(tables[0]) == 6
    assert tables[0] == tables[1]


def test_failed_accounts_are_fetched_as_printed(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The first command lists the account that failed; once its key is valid, the second one fetches it."""
    (commands,) = re.findall(r"```sh\n(.*?)```", PAGES["jobs"], re.DOTALL)
    first, second = (shlex.split(line)[1:] for line in commands.splitlines())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUDIENCES_BASE_URL", sandbox.base_url)
    sandbox.add_account("north", api_key="key-of-north")
    Path("accounts.csv").write_text("name,api_key\nnorth,key-of-north\nsouth,key-of-south\n")
    command = runner(monkeypatch, capsys)
    assert command(*first).returncode == 7
    sandbox.add_account("south", api_key="key-of-south")
    assert command(*second).returncode == 0
    assert [json.loads(line)["account"] for line in Path("more.ndjson").read_text().splitlines()] == ["south"]


def test_the_table_of_fields_is_true() -> None:
    """README names the fields of each model, in order."""
    for name, fields in TABLE_ROW.findall(section("What you get")):
        real = [field.name for field in attrs.fields(getattr(audiences_async, name))]
        assert re.findall(r"`(\w+)`", fields) == real


@pytest.mark.slow
def test_the_program_for_assistants_runs_as_printed(tmp_path: Path) -> None:
    """The program prints an answer, and an outcome."""
    done = run(program_of("agents"), tmp_path)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("north 2", "")


@pytest.mark.slow
@pytest.mark.skipif(missing("redis-server"), reason="redis-server is not installed")
def test_the_program_of_many_machines_runs_as_printed(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The program prints an answer that it waited for in Redis."""
    monkeypatch.setenv("AUDIENCES_BASE_URL", sandbox.base_url)
    monkeypatch.setenv("AUDIENCES_API_KEY", str(sandbox.add_account().api_key))
    folder = tmp_path / "redis"
    folder.mkdir()
    with redis_server(folder) as url:
        monkeypatch.setenv("REDIS_URL", url)
        done = run(program_of("many-machines"), tmp_path)
    assert (done.stdout, done.stderr) == ("2\n", "")


def test_every_exit_code_is_explained() -> None:
    """The page about exit codes has those of the code, and README too."""
    signals = {exits.SIGNALLED + number for number in (1, 2, 15)}
    real = {exits.DONE, exits.FAILED, exits.USAGE, exits.AUTHENTICATION, exits.UNAVAILABLE, exits.PARTIAL} | signals
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", PAGES["exit-codes"], re.MULTILINE)} == real
    shown = README.split("Exit codes: ")[1].split("\n\n")[0].replace("5xx", "")
    assert {int(code) for code in re.findall(r"(?:^|; |\n)(\d+)\s", shown)} == real


def test_every_environment_variable_is_named() -> None:
    """The page about the environment has each variable that the package reads."""
    code = "".join(path.read_text(encoding="utf-8") for path in Path(audiences_async.__file__).parent.rglob("*.py"))
    assert set(re.findall(r"`(AUDIENCES_[A-Z_]+)`", PAGES["environment"])) == set(
        re.findall(r"AUDIENCES_[A-Z_]+", code)
    )


def test_readme_is_short_and_links_every_page() -> None:
    """README has at most 330 lines, and a link to each page."""
    assert len(README.splitlines()) <= 330
    assert {f"audiences_async/help/{topic}.md" for topic in PAGES} <= set(re.findall(r"\]\(([^)]+)\)", README))
