"""The commands: data on stdout, all else on stderr. Keys come from the environment or a file, never from argv."""

import asyncio
import os
import random
import sys
import time
import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

from cyclopts import App, Parameter, Token
from rich.console import Console

from audiences_async._base import checks
from audiences_async._http.wire import base_url_or_default, endpoint
from audiences_async._version import __version__
from audiences_async.accounts import AccountFile
from audiences_async.cli import check as checking
from audiences_async.cli import doctor as diagnosis
from audiences_async.cli import fetch as fetching
from audiences_async.cli import pages, signals, summary
from audiences_async.cli import status as looking
from audiences_async.cli import worker as working
from audiences_async.cli.exits import AUTHENTICATION, DONE, FAILED, PARTIAL, USAGE, exit_code
from audiences_async.cli.log import Log, LogFormat, client_log, notify_production
from audiences_async.cli.output import Format, notices, notify, write
from audiences_async.cli.target import FileFormat, Target, format_of
from audiences_async.client import AudiencesClient
from audiences_async.credentials import Secret
from audiences_async.errors import AudiencesError, ConfigurationError, printable
from audiences_async.models import AudiencesResponse
from audiences_async.policies import RetryPolicy

app: Final = App(
    name="audiences",
    help="Fetch audiences from the CommBox API: complete answers or errors.",
    version=__version__,
    error_console=Console(file=notices(), emoji=False, markup=False),
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
app.register_install_completion_command(help="Install completion for the shell in use: bash, zsh, fish or powershell.")


def _integer(_: object, tokens: Sequence[Token]) -> int:
    text = tokens[0].value
    try:
        return int(text)  # Cyclopts itself would take 1.5 for 2
    except ValueError:
        raise ValueError(f"expected an integer, got {text!r}") from None


_Flag = Annotated[bool, Parameter(negative="")]
_Integer = Annotated[int, Parameter(converter=_integer)]


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; a usage error exits with 2."""
    # The locale may lack characters of the table; data is written as bytes.
    stdout: Any = sys.stdout
    stdout.reconfigure(errors="replace")
    try:
        with client_log():
            code = app(arguments)
    except KeyboardInterrupt:
        return signals.interrupted_code()
    except ConfigurationError as error:
        return _report_error(error.summary, error.hint, USAGE)
    except OSError as error:
        # stdout is unwritable: a closed pipe (`head`) or a full disk. Keep the interpreter from writing again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED if isinstance(error, BrokenPipeError) else _report_error(f"cannot write: {error}", "", FAILED)
    return code if isinstance(code, int) else DONE


@app.command
def demo(*, seed: _Integer | None = None) -> None:
    """Fetch three accounts from a sandbox that throttles, fails and hangs up; show the audiences and the attempts.

    Parameters
    ----------
    seed
        Seed of the faults and waits; the same seed gives the same output. Random by default.
    """
    from audiences_async.cli import demo as demonstration  # noqa: PLC0415 - its server is slow to import

    chosen = random.SystemRandom().randrange(10_000) if seed is None else seed
    notify(f"starting a sandbox with faults and a limit of 1 request/s per account (--seed {chosen}) …")
    demonstration.run(chosen, Console())


@app.command(name="help")
def show_page(topic: str | None = None, /) -> None:
    """Show a page about a topic, such as limits, errors or many-machines; without one, list the pages.

    Parameters
    ----------
    topic
        Name of the page.
    """
    pages.show(topic)


@app.command(name="list")
def list_audiences(
    *,
    output: Format | None = None,
    api_key_file: Path | None = None,
    base_url: str | None = None,
    timeout: float = 60.0,
    max_attempts: _Integer = 5,
    debug: _Flag = False,
) -> int:
    """List every audience of one account. The key is read from AUDIENCES_API_KEY, or from a file.

    Parameters
    ----------
    output
        Output format; by default a table on a terminal and NDJSON elsewhere.
    api_key_file
        File that contains only the key; /dev/stdin reads it from a pipe.
    base_url
        URL of the service; by default AUDIENCES_BASE_URL, else production.
    timeout
        Seconds for the whole call, including every attempt and wait.
    max_attempts
        Maximum number of requests, the first included.
    debug
        Show the traceback of an error.
    """
    if api_key_file is None and not os.environ.get("AUDIENCES_API_KEY"):
        return _report_error("no API key", "set AUDIENCES_API_KEY or use --api-key-file", AUTHENTICATION)
    try:
        key = None if api_key_file is None else _key_in(api_key_file)
    except (OSError, UnicodeError) as error:
        return _report_error(
            f"cannot read {api_key_file}: {error}", "use a text file that contains only the key", USAGE
        )
    try:
        response = asyncio.run(_fetch(key, base_url, timeout, max_attempts))
    except AudiencesError as error:
        if debug:
            notify(traceback.format_exc())
        code = _report_error(error.summary, error.hint, exit_code(error))
        notify_production(base_url)
        return code
    write(response, output)
    return DONE


@app.command
def doctor(
    *,
    api_key_file: Path | None = None,
    accounts: Path | None = None,
    base_url: str | None = None,
    timeout: float = 10.0,
) -> int:
    """Check the key, the host name, the connection, one request and the clock, and suggest a fix for each failure.

    Parameters
    ----------
    api_key_file
        File that contains only the key; by default the key is read from AUDIENCES_API_KEY.
    accounts
        File of accounts: its first account is checked in this way, and then one request is made for each account.
    base_url
        URL of the service; by default AUDIENCES_BASE_URL, else production.
    timeout
        Seconds for each check, and for each account.
    """
    source = "AUDIENCES_API_KEY" if api_key_file is None else str(api_key_file)
    try:
        where = endpoint(Secret(base_url_or_default(base_url)), allow_http=False)
        limit = checks.seconds("timeout", timeout)
        if accounts is not None:
            file = AccountFile(accounts)
            findings = asyncio.run(diagnosis.examine_accounts(file, where, base_url, limit))
        else:
            key = os.environ.get(source) if api_key_file is None else _key_in(api_key_file)
            findings = asyncio.run(diagnosis.examine(key, printable(source), where, limit))
    except (OSError, UnicodeError) as error:
        return _report_error(
            f"cannot read {api_key_file}: {error}", "use a text file that contains only the key", USAGE
        )
    except ConfigurationError as error:
        hint = "check --base-url and AUDIENCES_BASE_URL, or --timeout" if accounts is None else ""
        return _report_error(error.summary, hint, USAGE)
    diagnosis.show(findings, Console())
    return next((finding.code for finding in findings if finding.code), DONE)


@app.command
def fetch(
    *,
    accounts: Path,
    out: Path | None = None,
    output: FileFormat | None = None,
    rows: _Flag = False,
    errors: Path | None = None,
    resume: _Flag = False,
    check: _Flag = False,
    concurrency: _Integer = 100,
    rate: float | None = None,
    timeout: float = 60.0,
    patience: float = 900.0,
    max_attempts: _Integer = 5,
    base_url: str | None = None,
    allow_partial: _Flag = False,
    log_format: LogFormat = "text",
    metrics_file: Path | None = None,
    docket: str | None = None,
    queue: str | None = None,
    parts: str | None = None,
) -> int:
    """Fetch every account of a file; write each account's audiences, or its error, to another file.

    Parameters
    ----------
    accounts
        TOML, CSV or NDJSON file with the name and the api_key, api_key_env or api_key_from of each account.
    out
        File to write; .gz and .zst at the end of its name compress it. NDJSON is appended account by account, and is
        the checkpoint for --resume.
    output
        Format of the file; by default that of its extension: .csv, .json or .parquet, else NDJSON. All but NDJSON are
        written at the end, from an NDJSON file beside it that is kept. In CSV, a cell that a spreadsheet would execute,
        or that begins with an apostrophe, gets an apostrophe in front; to restore the text, remove one leading
        apostrophe. Parquet has one row per audience.
    rows
        Write one row per audience, always with the same columns, as NDJSON or CSV at the end.
    errors
        CSV or NDJSON file for the failed accounts, which --accounts reads again. It has no key: an account has the
        environment variable of its key, or the path of the file that has the key.
    resume
        Continue an existing output: keep fetched accounts, fetch failed and missing ones.
    check
        Only check the accounts file: print its format, its header, the first 20 problems, and their number.
    concurrency
        Maximum number of accounts in flight.
    rate
        Requests per second of all accounts together; by default the service's limit is learned. Waiting for the rate
        does not count towards an account's timeout.
    timeout
        Seconds for each account, including its attempts and its own waits.
    patience
        Longest outage in seconds: after that long without an answer to any account, the remaining accounts fail.
    max_attempts
        Maximum number of requests per account, the first included.
    base_url
        URL of the service; by default AUDIENCES_BASE_URL, else production.
    allow_partial
        Exit with 0 even if accounts failed.
    log_format
        Format of the messages on stderr. Without a terminal the progress is a line every 30 seconds.
    metrics_file
        File for metrics in the Prometheus text format, written every 30 seconds and at the end.
    docket
        URL of a Redis: `audiences worker` processes fetch the accounts, with their own settings.
    queue
        With --docket: name of the queue, if several fleets of workers share the Redis.
    parts
        With --docket: directory or bucket (s3://, gs:// or az://) that the workers write to; by default the output's
        name with .parts appended.
    """
    tally, log = summary.Tally(), Log(log_format)
    try:
        limits = fetching.Limits(concurrency, rate, timeout, patience, max_attempts)
        if docket is not None:
            _check_distributed(limits, base_url)
        elif queue is not None or parts is not None:
            raise ConfigurationError("--queue and --parts need --docket, the URL of a Redis")
        if check:
            return checking.show(accounts, with_keys=docket is None)
        if out is None:
            raise ConfigurationError("--out is missing; name the file to write, or use --check")
        file = AccountFile(accounts, with_keys=docket is None)
        target = Target(out, output or format_of(out), rows)
        job = fetching.Job(file, target, resume, limits, base_url, errors, metrics_file, log)
        if docket is None:
            fetching.run(job, tally)
        else:
            fetching.run_distributed(job, tally, docket, queue, parts or str(out.with_name(f"{out.name}.parts")))
    except AudiencesError as error:
        return _report_error(error.summary, error.hint, exit_code(error), log)
    except OSError as error:
        if check:
            raise  # stdout cannot be written, and no output
        hint = "fetched accounts are kept; use --resume to continue" if tally.total else "choose another --out"
        return _report_error(f"cannot write {error.filename or out}: {error.strerror or error}", hint, FAILED, log)
    except KeyboardInterrupt:
        kept = f"{tally.fetched:,} of {tally.total:,} accounts are fetched and kept"
        return _report_error(
            f"interrupted; {kept}", "run the same command with --resume to continue", signals.interrupted_code(), log
        )
    log.write("summary", "\n".join(summary.text(tally, out)), **summary.fields(tally, out))
    return DONE if allow_partial or not tally.failed else PARTIAL


@app.command
def worker(
    *,
    docket: str,
    accounts: Path,
    out: str,
    queue: str | None = None,
    concurrency: _Integer = 100,
    rate: float | None = None,
    account_rate: float | None = None,
    timeout: float = 60.0,
    patience: float = 900.0,
    grace: float = 20.0,
    max_attempts: _Integer = 5,
    base_url: str | None = None,
) -> int:
    """Fetch accounts for `audiences fetch --docket` until interrupted; then no further account is started.

    Parameters
    ----------
    docket
        URL of the Redis. Anyone who can write to it can run code in this process.
    accounts
        TOML, CSV or NDJSON file with the name and the api_key, api_key_env or api_key_from of each account; keys stay
        on this machine.
    out
        Directory shared by all workers and the submitting machine; or a bucket: s3://, gs:// or az://, with the
        credentials in the environment.
    queue
        Name of the queue, if several fleets of workers share the Redis.
    concurrency
        Maximum number of accounts in flight in this process.
    rate
        Requests per second of all workers of the queue together; by default the service's limit is learned.
    account_rate
        Requests per second of each account, over all workers; by default each account's rate is learned.
    timeout
        Seconds for each account, including its attempts and its own waits.
    patience
        Longest outage in seconds: after that long without an answer to any account, the remaining accounts fail.
    grace
        Seconds for accounts in flight after SIGTERM or Ctrl-C; the others go back to the queue at once.
    max_attempts
        Maximum number of requests per account, the first included.
    base_url
        URL of the service; by default AUDIENCES_BASE_URL, else production.
    """
    try:
        _require_docket()
        file = AccountFile(accounts)
        settings = working.Settings(
            docket, file, out, queue, concurrency, rate, account_rate, timeout, patience, grace, max_attempts, base_url
        )
        asyncio.run(working.run(settings))
    except AudiencesError as error:
        return _report_error(error.summary, error.hint, exit_code(error))
    except KeyboardInterrupt:
        pass  # Ctrl-C is the normal end of a worker
    return DONE


@app.command
def status(*, docket: str, queue: str | None = None, json: _Flag = False) -> int:
    """Show the workers and jobs of a queue: chunks, accounts, rates and errors; on a terminal until Ctrl-C.

    Parameters
    ----------
    docket
        URL of the Redis.
    queue
        Name of the queue, if several fleets of workers share the Redis.
    json
        Print one line of JSON instead.
    """
    try:
        _require_docket()
        asyncio.run(looking.run(docket, queue, as_json=json))
    except AudiencesError as error:
        return _report_error(error.summary, error.hint, exit_code(error))
    except KeyboardInterrupt:
        pass  # Ctrl-C is the normal end
    return DONE


@app.command
def sandbox(
    *,
    account: list[str] | None = None,
    accounts: Path | None = None,
    port: _Integer = 0,
    audiences: _Integer = 20,
    fault_rate: float = 0.0,
    rate: float | None = None,
    burst: _Integer = 1,
    seed: _Integer = 0,
) -> int:
    """Serve the sandbox until interrupted; print its base URL and keys as environment variables.

    Parameters
    ----------
    account
        Name of an account to open; repeat for more. By default one account named default.
    accounts
        TOML, CSV or NDJSON file of accounts to open instead of --account, with their own keys; no key is printed.
    port
        Port on the loopback address; 0 picks a free port.
    audiences
        Number of audiences per account.
    fault_rate
        Share of answers that fail, from 0.0 to 1.0.
    rate
        Requests per second granted to each account; unlimited by default.
    burst
        Requests granted at once after a pause.
    seed
        Seed of the faults.
    """
    from audiences_async.sandbox import Sandbox, many_audiences  # noqa: PLC0415 - slow to import

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
            notify("serving until interrupted (Ctrl-C) …")
            _wait_forever()
    except KeyboardInterrupt:
        return DONE  # Ctrl-C is the normal end of a server
    except AudiencesError as error:
        return _report_error(error.summary, error.hint, exit_code(error))
    except (OSError, OverflowError) as error:
        return _report_error(f"cannot listen on port {port}: {error}", "choose another --port", FAILED)


def _wait_forever() -> NoReturn:
    while True:
        time.sleep(3600)


async def _fetch(key: str | None, base_url: str | None, timeout: float, max_attempts: int) -> AudiencesResponse:
    retry = RetryPolicy(max_attempts=max_attempts)
    async with AudiencesClient(key, base_url=base_url, timeout=timeout, retry=retry) as client:
        return await client.get_audiences()


def _require_docket() -> None:
    if find_spec("docket") is None:
        raise ConfigurationError("distributed jobs need the extra 'docket': pip install 'audiences_async[docket]'")


def _check_distributed(limits: fetching.Limits, base_url: str | None) -> None:
    _require_docket()
    if limits != fetching.Limits() or base_url is not None:
        options = "--concurrency, --rate, --timeout, --patience, --max-attempts or --base-url"
        problem = f"--docket cannot be combined with {options}"
        raise ConfigurationError(f"{problem}; set these limits on `audiences worker` instead")


def _key_in(file: Path) -> str:
    return file.read_text(encoding="utf-8-sig").strip()


def _report_error(problem: str, hint: str, code: int, log: Log = Log()) -> int:  # noqa: B008 - a frozen value
    shown = f"error: {printable(problem, limit=2000)}"
    log.write("error", f"{shown}\nhint: {hint}" if hint else shown, message=problem, hint=hint, exit_code=code)
    return code
