"""The commands: data on stdout, everything else on stderr; keys from the environment or a file, never from argv."""

import asyncio
import os
import random
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

from cyclopts import App, Parameter
from rich.console import Console

from audiences_async._version import __version__
from audiences_async.cli import demo as demonstration
from audiences_async.cli.exits import AUTHENTICATION, DONE, FAILED, INTERRUPTED, USAGE, exit_code
from audiences_async.cli.output import Format, write
from audiences_async.client import AudiencesClient
from audiences_async.errors import AudiencesError, printable
from audiences_async.models import AudiencesResponse
from audiences_async.retrying import RetryPolicy
from audiences_async.sandbox import Sandbox, many_audiences

app: Final = App(
    name="audiences",
    help="Every audience of a CommBox account, or an error that says why not.",
    version=__version__,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
_Flag = Annotated[bool, Parameter(negative="")]


def run(arguments: list[str] | None = None) -> int:
    """Run one command and give its exit code; a wrong usage exits with 2 on its own."""
    if sys.stdout is None:
        return _complain("stdout is closed", "", FAILED)
    # A table may be shown in a locale that lacks its letters; data is written as bytes.
    stdout: Any = sys.stdout
    stdout.reconfigure(errors="replace")
    try:
        code = app(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
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
    _say(f"a sandbox with faults, and a limit of 1 request/s for each account (--seed {chosen}) …")
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
            traceback.print_exc()
        return _complain(error.summary, error.hint, exit_code(error))
    write(response, output)
    return DONE


@app.command
def sandbox(
    *,
    account: list[str] | None = None,
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
            opened = [
                server.add_account(
                    name, audiences=many_audiences(name, audiences), fault_rate=fault_rate, rate=rate, burst=burst
                )
                for name in account or ["default"]
            ]
            keys = "".join(f"AUDIENCES_API_KEY={one.api_key}\n" for one in opened)
            print(f"AUDIENCES_BASE_URL={server.base_url}\n{keys}", end="", flush=True)
            _say("serving until interrupted (Ctrl-C) …")
            _wait_forever()
    except KeyboardInterrupt:
        return DONE  # how a server ends
    except AudiencesError as error:
        return _complain(error.summary, error.hint, exit_code(error))
    except (OSError, OverflowError) as error:
        return _complain(f"cannot listen on port {port}: {error}", "give another --port", FAILED)


def _wait_forever() -> NoReturn:
    while True:
        signal.pause()


async def _fetch(key: str | None, base_url: str | None, timeout: float, max_attempts: int) -> AudiencesResponse:
    retry = RetryPolicy(max_attempts=max_attempts)
    async with AudiencesClient(key, base_url=base_url, timeout=timeout, retry=retry) as client:
        return await client.get_audiences()


def _say(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)


def _complain(problem: str, hint: str, code: int) -> int:
    _say(f"error: {printable(problem, limit=2000)}")
    if hint:
        _say(f"hint: {hint}")
    return code
