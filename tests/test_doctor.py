"""``audiences doctor`` finds the right cause in each broken state, and suggests a fix."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
import trustme
from command import KEY, Done, runner
from services import free_port

from audiences_async.sandbox import Answer, Sandbox


@pytest.fixture
def run(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Return a function that runs the command line with the sandbox's URL and a valid key."""
    sandbox.add_account("default", api_key=KEY)
    monkeypatch.setenv("AUDIENCES_BASE_URL", sandbox.base_url)
    monkeypatch.setenv("AUDIENCES_API_KEY", KEY)
    return runner(monkeypatch, capsys)


def states(done: Done) -> list[tuple[str, str]]:
    """Return each check and its state."""
    rows = [line.split() for line in done.stdout.splitlines() if not line.startswith(" ")]
    return [(row[1], row[0]) for row in rows]


def test_all_is_well(run: Callable[..., Done], tmp_path: Path) -> None:
    """Report each check's finding, without the key."""
    done = run("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    assert states(done) == [(name, "ok") for name in ("key", "name", "connect", "request", "quota", "clock")]
    assert "from AUDIENCES_API_KEY, 10 characters" in done.stdout
    assert "HTTP 200, 2 audiences" in done.stdout
    assert KEY not in done.stdout
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert f"from {tmp_path}/key" in run("doctor", "--api-key-file", str(tmp_path / "key"), AUDIENCES_API_KEY="").stdout


@pytest.mark.parametrize(
    ("answer", "code", "told", "hint"),
    [
        (Answer(401), 4, "HTTP 401 Unauthorized", "check the account's API key in the management console"),
        (Answer(403), 4, "HTTP 403 Forbidden", "check what the account's API key may do"),
        (Answer(404), 1, "HTTP 404 Not Found", "check base_url"),
        (Answer(400), 1, "HTTP 400 Bad Request", "see the service's description"),
        (Answer(429), 5, "HTTP 429 Too Many Requests", "ask less often"),
        (Answer(503), 5, "HTTP 503 Service Unavailable", "try again later"),
        (Answer(200, "<html>"), 1, "the reply cannot be read", "the service may have changed"),
        (Answer(failure="reset"), 5, "before a reply came", "any proxy in between"),
        (Answer(delay=60), 5, "no complete reply within", "try again later"),
    ],
)
def test_a_request_that_fails(
    run: Callable[..., Done], sandbox: Sandbox, answer: Answer, code: int, told: str, hint: str
) -> None:
    """Report the service's error with its hint, after exactly one request."""
    sandbox.script("default", answer)
    done = run("doctor", "--timeout", "0.5")
    assert (done.returncode, done.stderr) == (code, "")
    assert ("request", "FAILED") in states(done)
    assert told in done.stdout
    assert hint in done.stdout
    assert len(sandbox.requests) == 1


@pytest.mark.parametrize(("hours", "told"), [(2, "7,"), (-2, "7,"), (0, "")])
def test_the_clock(run: Callable[..., Done], sandbox: Sandbox, hours: int, told: str) -> None:
    """Report a clock that differs from the response's Date, with the difference."""
    date = format_datetime(datetime.now(UTC) + timedelta(hours=hours), usegmt=True)
    sandbox.script("default", Answer(headers={"Date": date}))
    done = run("doctor")
    assert states(done)[-1] == ("clock", "FAILED" if hours else "ok")
    assert done.returncode == (1 if hours else 0)
    if hours:
        assert f"this machine's clock is {told}" in done.stdout
        assert ("behind" if hours > 0 else "ahead of") in done.stdout


def test_a_reply_without_a_date(run: Callable[..., Done], sandbox: Sandbox) -> None:
    """If the response has no readable Date, the clock is not reported."""
    sandbox.script("default", Answer(headers={"Date": "today"}))
    assert states(run("doctor"))[-1] == ("quota", "ok")


@pytest.mark.parametrize(("key", "told"), [("", "no API key"), ("two\nlines", "has a line break")])
def test_a_key_that_cannot_be_used(run: Callable[..., Done], sandbox: Sandbox, key: str, told: str) -> None:
    """Send nothing without a usable key, but still check the connection."""
    done = run("doctor", AUDIENCES_API_KEY=key)
    assert states(done) == [("key", "FAILED"), ("name", "ok"), ("connect", "ok")]
    assert (done.returncode, sandbox.requests) == (4, [])
    assert told in done.stdout


def test_a_name_that_is_not_found(run: Callable[..., Done]) -> None:
    """Report an unknown host, and end the checks."""
    done = run("doctor", "--base-url", "https://no-such-host.invalid/")
    assert (done.returncode, states(done)) == (5, [("key", "ok"), ("name", "FAILED")])
    assert "check base_url for a typo, and this machine's DNS" in done.stdout


def test_nobody_listens(run: Callable[..., Done]) -> None:
    """Report a closed port, and end the checks."""
    done = run("doctor", "--base-url", f"http://127.0.0.1:{free_port()}/")
    assert (done.returncode, states(done)[-1]) == (5, ("connect", "FAILED"))
    assert "Connect call failed" in done.stdout


def test_no_answer_at_all(run: Callable[..., Done]) -> None:
    """End TLS within the timeout if a peer accepts and stays silent."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        done = run("doctor", "--timeout", "0.2", "--base-url", f"https://localhost:{silent.getsockname()[1]}/")
    assert (done.returncode, states(done)[-1]) == (5, ("connect", "FAILED"))
    assert "no answer in time" in done.stdout


def test_no_tls(run: Callable[..., Done], sandbox: Sandbox) -> None:
    """Report a plain HTTP server behind an https URL as such."""
    done = run("doctor", "--base-url", sandbox.base_url.replace("http://", "https://"))
    assert (done.returncode, states(done)[-1]) == (5, ("tls", "FAILED"))
    assert "does not speak TLS" in done.stdout


@pytest.fixture
def secured() -> Iterator[tuple[int, trustme.CA]]:
    """Yield a port that completes a TLS handshake and sends nothing."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    raw, _ = server.accept()
                except OSError:
                    return
                with raw:
                    try:
                        with context.wrap_socket(raw, server_side=True) as shaken:
                            shaken.recv(1000)
                    except OSError:
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1], authority
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_certificate(run: Callable[..., Done], secured: tuple[int, trustme.CA], tmp_path: Path) -> None:
    """Report an untrusted certificate, and a trusted one with its remaining validity."""
    port, authority = secured
    done = run("doctor", "--base-url", f"https://localhost:{port}/")
    assert (done.returncode, states(done)[-1]) == (5, ("tls", "FAILED"))
    assert "is not trusted" in done.stdout
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    done = run("doctor", "--base-url", f"https://localhost:{port}/", SSL_CERT_FILE=str(tmp_path / "ca.pem"))
    assert ("tls", "ok") in states(done)
    assert "certificate valid for " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--base-url", "ftp://example.org"], "base_url must be an absolute https:// URL"),
        (["--timeout", "0"], "timeout must be"),
        (["--api-key-file", "/no/such/file"], "cannot read /no/such/file"),
    ],
)
def test_wrong_usage(run: Callable[..., Done], arguments: list[str], told: str) -> None:
    """Report a usage error before the first check."""
    done = run("doctor", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr


def test_the_quota_headers_that_it_saw(run: Callable[..., Done], sandbox: Sandbox) -> None:
    """List the quota headers of the answer, without the key, or report that there are none."""
    assert "no quota headers" in run("doctor").stdout
    headers = {"X-RateLimit-Remaining": "4", "ratelimit": f'"{KEY}";r=4;t=5', "X-Other": "1"}
    sandbox.script("default", Answer(headers=headers), Answer(429, retry_after=7))
    (shown,) = [line for line in run("doctor").stdout.splitlines() if " quota " in line]
    assert "X-RateLimit-Remaining: 4" in shown
    assert (";r=4;t=5" in shown, "X-Other" in shown, KEY in shown) == (True, False, False)
    assert "Retry-After: 7" in run("doctor").stdout


def test_it_is_in_colour(run: Callable[..., Done]) -> None:
    """Show passed and failed checks in colour if the terminal has colours."""
    shown = run("doctor", FORCE_COLOR="1", AUDIENCES_API_KEY="two\nlines").stdout
    assert "\x1b[1;31mFAILED" in shown
    assert "\x1b[32mok" in shown
    assert "\x1b" not in run("doctor", FORCE_COLOR="1", NO_COLOR="1", TERM="dumb").stdout


@pytest.fixture
def accounts(sandbox: Sandbox, tmp_path: Path) -> Path:
    """Return a file of three accounts that the sandbox knows."""
    file = tmp_path / "accounts.csv"
    file.write_text("name,api_key\n" + "".join(f"{name},{KEY}-{name}\n" for name in ("north", "south", "east")))
    for name in ("north", "south", "east"):
        sandbox.add_account(name, api_key=f"{KEY}-{name}")
    return file


def test_every_account_of_a_file(run: Callable[..., Done], sandbox: Sandbox, accounts: Path) -> None:
    """Check the first account of a file, and make a request for each of them."""
    done = run("doctor", "--accounts", str(accounts), AUDIENCES_API_KEY="")
    assert (done.returncode, done.stderr) == (0, "")
    names = ("accounts", "key", "name", "connect", "request", "quota", "clock", "all")
    assert states(done) == [(name, "ok") for name in names]
    assert f"3 in {accounts}" in done.stdout
    assert "3 of 3 accounts answered, 6 audiences" in done.stdout
    assert KEY not in done.stdout


def test_accounts_of_a_file_that_fail(run: Callable[..., Done], sandbox: Sandbox, accounts: Path) -> None:
    """Name the accounts that fail with the reason and a hint, also if the first one is among them."""
    sandbox.script("north", Answer(401), Answer(401))
    sandbox.script("east", Answer(403))
    done = run("doctor", "--accounts", str(accounts))
    assert done.returncode == 4  # of the first check that failed
    assert states(done)[-1] == ("all", "FAILED")
    assert "1 of 3 accounts answered" in done.stdout
    assert "1 × ForbiddenError (HTTP 403): east" in done.stdout
    sandbox.script("east", Answer(403))
    assert run("doctor", "--accounts", str(accounts)).returncode == 7


def test_accounts_without_a_service(run: Callable[..., Done], accounts: Path) -> None:
    """Make no request for each account if the service cannot be reached; refuse an accounts file with mistakes."""
    done = run("doctor", "--accounts", str(accounts), "--base-url", f"http://127.0.0.1:{free_port()}/")
    assert (done.returncode, states(done)[-1]) == (5, ("connect", "FAILED"))
    accounts.write_text("name;api_key\nnorth;\n")
    done = run("doctor", "--accounts", str(accounts))
    assert (done.returncode, done.stdout, "line 2, column 2" in done.stderr) == (2, "", True)
