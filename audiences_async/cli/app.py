"""The commands: data on stdout, everything else on stderr; keys from the environment or a file, never from argv."""

import asyncio
import os
import random
import sys
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

from cyclopts import App, Parameter
from rich.console import Console

from audiences_async import checks
from audiences_async._version import __version__
from audiences_async.accounts import AccountFile
from audiences_async.cli import demo as demonstration
from audiences_async.cli import fetch as fetching
from audiences_async.cli import signals
from audiences_async.cli import worker as working
from audiences_async.cli.doctor import examine
from audiences_async.cli.exits import AUTHENTICATION, DONE, FAILED, PARTIAL, USAGE, exit_code
from audiences_async.cli.output import FileFormat, Format, notices, say, write
from audiences_async.client import AudiencesClient
from audiences_async.credentials import Secret
from audiences_async.errors import AudiencesError, ConfigurationError, printable
from audiences_async.models import AudiencesResponse
from audiences_async.retrying import RetryPolicy
from audiences_async.sandbox import Sandbox, many_audiences
from audiences_async.wire import PRODUCTION, endpoint

app: Final = App(
    name="audiences",
    help="Every audience of a CommBox account, or an error that says why not.",
    version=__version__,
    error_console=Console(file=notices(), emoji=False, markup=False),
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
_Flag = Annotated[bool, Parameter(negative="")]


def run(arguments: list[str] | None = None) -> int:
    """Run one command and give its exit code; a wrong usage exits with 2 on its own."""
    # A table may be shown in a locale that lacks its letters; data is written as bytes.
    stdout: Any = sys.stdout
    stdout.reconfigure(errors="replace")
    try:
        code = app(arguments)
    except KeyboardInterrupt:
        return signals.exit_code()
    except OSError as error:
        # Nobody can be written to: a reader that has gone, as `head` does, or a full disk. The interpreter must not
        # try once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED if isinstance(error, BrokenPipeError) else _complain(f"cannot write: {error}", "", FAILED)
    return code if isinstance(code, int) else DONE


@app.command
def demo(*, seed: int | None = None) -> None:
    """Fetch three accounts from a sandbox that throttles, fails and hangs up; show what came and what it took.

    Parameters
    ----------
    seed
        Decides the faults and the waits; the same seed shows the same again. Left out, one is drawn.
    """
    chosen = random.SystemRandom().randrange(10_000) if seed is None else seed
    say(f"a sandbox with faults, and a limit of 1 request/s for each account (--seed {chosen}) …")
    demonstration.run(chosen, Console())


@app.command(name="list")
def list_audiences(
    *,
    output: Format | None = None,
    api_key_file: Path | None = None,
    base_url: str | None = None,
    timeout: float = 60.0,
    max_attempts: int = 5,
    debug: _Flag = False,
) -> int:
    """List every audience of one account. The key is read from AUDIENCES_API_KEY, or from a file.

    Parameters
    ----------
    output
        The form of the list; left out, a table on a terminal and NDJSON elsewhere.
    api_key_file
        A file that holds the key and nothing else; /dev/stdin reads it from a pipe.
    base_url
        Where the service is; else AUDIENCES_BASE_URL, else production.
    timeout
        Seconds for the whole call, every attempt and wait included.
    max_attempts
        Requests at the most, the first included.
    debug
        Show the traceback of an error.
    """
    if api_key_file is None and not os.environ.get("AUDIENCES_API_KEY"):
        return _complain("no API key", "set AUDIENCES_API_KEY, or give --api-key-file", AUTHENTICATION)
    try:
        key = None if api_key_file is None else api_key_file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeError) as error:
        return _complain(f"cannot read {api_key_file}: {error}", "give a text file that holds the key", USAGE)
    try:
        response = asyncio.run(_fetch(key, base_url, timeout, max_attempts))
    except AudiencesError as error:
        if debug:
            say(traceback.format_exc())
        return _complain(error.summary, error.hint, exit_code(error))
    write(response, output)
    return DONE


@app.command
def doctor(*, api_key_file: Path | None = None, base_url: str | None = None, timeout: float = 10.0) -> int:
    """Check the key, the name, the connection, one request and the clock, and say what to do about what fails.

    Parameters
    ----------
    api_key_file
        A file that holds the key and nothing else; left out, the key is read from AUDIENCES_API_KEY.
    base_url
        Where the service is; else AUDIENCES_BASE_URL, else production.
    timeout
        Seconds for each check.
    """
    source = "AUDIENCES_API_KEY" if api_key_file is None else str(api_key_file)
    try:
        key = os.environ.get(source) if api_key_file is None else api_key_file.read_text(encoding="utf-8-sig").strip()
        where = endpoint(Secret(base_url or os.environ.get("AUDIENCES_BASE_URL") or PRODUCTION), allow_http=False)
        findings = asyncio.run(examine(key, printable(source), where, checks.seconds("timeout", timeout)))
    except (OSError, UnicodeError) as error:
        return _complain(f"cannot read {api_key_file}: {error}", "give a text file that holds the key", USAGE)
    except ConfigurationError as error:
        return _complain(error.summary, "check --base-url and AUDIENCES_BASE_URL, or --timeout", USAGE)
    for finding in findings:
        print(f"{'FAILED' if finding.code else 'ok':8}{finding.check:9}{printable(finding.told, limit=500)}")
        if finding.code:
            print(f"{'':8}{'':9}{finding.hint}")
    return next((finding.code for finding in findings if finding.code), DONE)


@app.command
def fetch(
    *,
    accounts: Path,
    out: Path,
    output: FileFormat = "ndjson",
    resume: _Flag = False,
    concurrency: int = 100,
    rate: float | None = None,
    timeout: float = 60.0,
    patience: float = 900.0,
    max_attempts: int = 5,
    base_url: str | None = None,
    allow_partial: _Flag = False,
    docket: str | None = None,
    parts: Path | None = None,
) -> int:
    """Fetch every account of a file into another file, each account's audiences or its error.

    Parameters
    ----------
    accounts
        A TOML, CSV or NDJSON file with the name and the api_key, or the api_key_env, of each account.
    out
        The file to write. NDJSON is appended to, account by account, and is what --resume goes on from.
    output
        The form of the file; json and csv are written at the end, from an NDJSON file beside it that stays.
    resume
        Go on with what is there: fetched accounts are kept, failed ones and the rest are fetched.
    concurrency
        Accounts under way at the same time.
    rate
        Requests per second, of all accounts together; left out, a limit of the service's is learned. Waiting for it
        takes nothing of an account's time.
    timeout
        Seconds for each account, every attempt and wait of its own included.
    patience
        Seconds in a row in which the service may answer nobody, before the remaining accounts fail.
    max_attempts
        Requests for each account at the most, the first included.
    base_url
        Where the service is; else AUDIENCES_BASE_URL, else production.
    allow_partial
        Exit with 0 also where accounts have failed.
    docket
        URL of a Redis: let the workers of `audiences worker` fetch; how they do it is theirs to say.
    parts
        With --docket: the directory that the workers write to; else the output's name with .parts.
    """
    tally = fetching.Tally()
    try:
        if docket is not None:
            _need_docket()
            if (concurrency, rate, timeout, patience, max_attempts, base_url) != (100, None, 60.0, 900.0, 5, None):
                raise ConfigurationError("how accounts are fetched is for `audiences worker` to say, not with --docket")
        file = AccountFile(accounts, with_keys=docket is None)
        job = fetching.Job(file, out, output, resume, concurrency, rate, timeout, patience, max_attempts, base_url)
        if docket is None:
            fetching.run(job, tally)
        else:
            fetching.run_distributed(job, tally, docket, parts or out.with_name(f"{out.name}.parts"))
    except AudiencesError as error:
        return _complain(error.summary, error.hint, exit_code(error))
    except OSError as error:
        return _complain(
            f"cannot write {out}: {error.strerror or error}", "what is done is kept; --resume goes on", FAILED
        )
    except KeyboardInterrupt:
        kept = f"{tally.fetched:,} of {tally.total:,} accounts are fetched and kept"
        return _complain(f"interrupted; {kept}", "the same command with --resume goes on", signals.exit_code())
    for line in tally.summary():
        say(line)
    return DONE if allow_partial or not tally.failed else PARTIAL


@app.command
def worker(
    *,
    docket: str,
    accounts: Path,
    out: Path,
    concurrency: int = 100,
    account_rate: float | None = None,
    timeout: float = 60.0,
    patience: float = 900.0,
    max_attempts: int = 5,
    base_url: str | None = None,
) -> int:
    """Fetch for `audiences fetch --docket`, until interrupted; what is under way then is finished first.

    Parameters
    ----------
    docket
        URL of the Redis. Whoever can write to it can run code here.
    accounts
        A TOML, CSV or NDJSON file with the name and the api_key, or the api_key_env, of each account; keys stay here.
    out
        A directory that all workers and whoever submits share.
    concurrency
        Accounts under way at the same time in this process.
    account_rate
        Requests per second of each account, whichever worker sends them; left out, each account is held to what the
        service grants it.
    timeout
        Seconds for each account, every attempt and wait of its own included.
    patience
        Seconds in a row in which the service may answer nobody, before the remaining accounts fail.
    max_attempts
        Requests for each account at the most, the first included.
    base_url
        Where the service is; else AUDIENCES_BASE_URL, else production.
    """
    try:
        _need_docket()
        known = {account.name: account for account in AccountFile(accounts)}
        settings = working.Settings(
            docket, known, out, concurrency, account_rate, timeout, patience, max_attempts, base_url
        )
        asyncio.run(working.run(settings))
    except AudiencesError as error:
        return _complain(error.summary, error.hint, exit_code(error))
    except OSError as error:
        return _complain(f"cannot write to {out}: {error.strerror or error}", "", FAILED)
    except KeyboardInterrupt:
        pass  # how a worker ends
    return DONE


@app.command
def sandbox(
    *,
    account: list[str] | None = None,
    accounts: Path | None = None,
    port: int = 0,
    audiences: int = 20,
    fault_rate: float = 0.0,
    rate: float | None = None,
    burst: int = 1,
    seed: int = 0,
) -> int:
    """Serve the sandbox until interrupted; print its base URL and keys, ready for the environment.

    Parameters
    ----------
    account
        Name of an account to open; give it again for more. Left out, one named default.
    accounts
        A TOML, CSV or NDJSON file of accounts to open in place of --account, with their own keys; none is printed.
    port
        Port on the loopback address; 0 means any that is free.
    audiences
        Audiences of each account.
    fault_rate
        Share of the answers that go wrong, from 0.0 to 1.0.
    rate
        Requests per second that each account is granted; left out, any number.
    burst
        Requests granted at once after a pause.
    seed
        Decides the faults.
    """
    try:
        with Sandbox(seed=seed, port=port) as server:
            keys: dict[str, Any] = {one.name: one.api_key for one in AccountFile(accounts)} if accounts else {}
            opened = [
                server.add_account(
                    name,
                    api_key=keys.get(name),
                    audiences=many_audiences(name, audiences),
                    fault_rate=fault_rate,
                    rate=rate,
                    burst=burst,
                )
                for name in keys or account or ["default"]
            ]
            shown = [] if accounts else [f"AUDIENCES_API_KEY={one.api_key}\n" for one in opened]
            print(f"AUDIENCES_BASE_URL={server.base_url}\n{''.join(shown)}", end="", flush=True)
            say("serving until interrupted (Ctrl-C) …")
            _wait_forever()
    except KeyboardInterrupt:
        return DONE  # how a server ends
    except AudiencesError as error:
        return _complain(error.summary, error.hint, exit_code(error))
    except (OSError, OverflowError) as error:
        return _complain(f"cannot listen on port {port}: {error}", "give another --port", FAILED)


def _wait_forever() -> NoReturn:
    while True:
        time.sleep(3600)


async def _fetch(key: str | None, base_url: str | None, timeout: float, max_attempts: int) -> AudiencesResponse:
    retry = RetryPolicy(max_attempts=max_attempts)
    async with AudiencesClient(key, base_url=base_url, timeout=timeout, retry=retry) as client:
        return await client.get_audiences()


def _need_docket() -> None:
    if find_spec("docket") is None:
        raise ConfigurationError("several machines need an extra: pip install 'audiences_async[docket]'")


def _complain(problem: str, hint: str, code: int) -> int:
    say(f"error: {printable(problem, limit=2000)}")
    if hint:
        say(f"hint: {hint}")
    return code
