"""The masked API key, and fresh keys from a function."""

import asyncio
import base64
import copy
import pickle
import time
import traceback
from typing import Any

import pytest

from audiences_async import Account, AudiencesClient, CachePolicy, ConfigurationError
from audiences_async.credentials import ApiKey, KeySource
from audiences_async.sandbox import Sandbox

KEY = "s3cr3t-k3y"


@pytest.mark.parametrize("text", ["", "a\nb", "a\r\n", "\ta", "a\x00", "a\x7f", "a\x85", " a", "a ", "\ud800", b"a", 5])
def test_a_key_that_cannot_be_sent_is_refused(text: Any) -> None:
    """Reject a key that is empty, not text, or has control characters or white space around it."""
    with pytest.raises(ConfigurationError, match="the API key") as caught:
        Account("north", text)
    assert caught.value.account == "north"


def test_a_copy_keeps_its_key_and_a_pickle_does_not() -> None:
    """Accounts compare and hash by value and can be copied; a pickled one has no key."""
    account = Account("north", KEY)
    copies = copy.copy(account), copy.deepcopy(account), Account("north", KEY)
    assert {account, *copies} == {account}
    assert {account.credential, *(each.credential for each in copies)} == {account.credential}
    assert all(each.api_key == KEY for each in copies)
    assert copy.copy(account.credential) is account.credential
    assert account != Account("north", "another")
    thawed = pickle.loads(pickle.dumps(account))
    assert thawed.name == "north"
    with pytest.raises(LookupError, match="API keys are not pickled"):
        thawed.api_key()


@pytest.mark.parametrize("text", ["a", "a b", "ключ", "x" * 10_000])
def test_a_key_is_opaque(text: str) -> None:
    """Accept any other text as a key, and return it unchanged."""
    assert Account("north", text).api_key == text


@pytest.mark.parametrize("name", ["", None, 5])
def test_an_account_needs_a_name(name: Any) -> None:
    """Require a name of non-empty text."""
    with pytest.raises(ConfigurationError, match="non-empty name"):
        Account(name, KEY)


def test_the_key_is_in_no_repr() -> None:
    """Neither the account nor the masked key print the key."""
    account = Account("north", KEY)
    assert repr(account) == "Account('north')"
    assert KEY not in f"{account!s} {account.credential!r} {account.credential!s}"


def test_accounts_are_values() -> None:
    """Accounts are equal by name and key."""
    assert Account("north", KEY) == Account("north", KEY)
    assert len({Account("north", KEY), Account("north", KEY), Account("north", "other")}) == 2
    assert ApiKey(KEY) != KEY


def test_the_key_is_in_no_traceback() -> None:
    """Render a traceback with the locals of our frames without the key."""
    try:
        Account("", KEY)
    except ConfigurationError as error:
        summary = traceback.TracebackException.from_exception(error, capture_locals=True)
        ours = [str(frame.locals) for frame in summary.stack if "audiences_async" in frame.filename]
    assert ours
    assert not any(KEY in shown for shown in ours)


LONG = "Zq7Lw3RtB9fK2mXv-5hNd8Ys"


@pytest.mark.parametrize(
    ("key", "text", "redacted"),
    [
        ("new-key", "old-new-key-now", "old-***-now"),
        (
            "new+key",
            r"the old-new\u002Bkey-now, see https://x.example/?q=new%2Bkey&p=1",
            "the ***, see https://x.example/?q=***=1",
        ),
        (LONG, f"the key {LONG[:18]}... is not {LONG[5:].upper()}", "the key ***... is not ***"),
        (LONG, f"the key {LONG[:16]} is fine", f"the key {LONG[:16]} is fine"),
        ("sandbox-key-refusing-7", "refusing-7", "refusing-7"),
        ("my-account-key", "my account has no key", "my account has no key"),
        ("my-production-accounts-key", "accounts/production: my key", "accounts/production: my key"),
        ("key", "monkey: no KEY", "mon***: no ***"),
        ("a&b", "about a&b", "about ***"),
        ("Zq7'Lw3", "the key Zq7&#39;Lw3 of 'x'", "the key *** of 'x'"),
        ("ключ", r"\u043a\u043b\u044e\u0447 %D0%BA%D0%BB%D1%8E%D1%87 &#1082;&#1083;&#1102;&#1095;", "*** *** ***"),
        ("pass word", "a pass&#32;word", "***"),
    ],
)
def test_words_with_an_escaped_key_are_masked(key: str, text: str, redacted: str) -> None:
    """Mask the key, and a word with an escaped key, or most of it, as a whole; others stay."""
    assert ApiKey(key).redact(text) == redacted


@pytest.mark.parametrize("before", ["Bearer ", "me:", ""])
def test_base64_is_masked_wherever_the_key_begins(before: str) -> None:
    """Mask a key in Base64 whatever is encoded before and after it."""
    encoded = base64.b64encode(f"{before}{LONG} and more".encode()).decode()
    assert ApiKey(LONG).redact(f"got {encoded}").rstrip("=") == "got ***"


@pytest.mark.parametrize("shown", [4, 8, 23])
@pytest.mark.parametrize("quoted", ["{}", "[{}", '"{}', "x" * 50 + "{}"])
def test_a_key_at_the_cut_of_a_body(shown: int, quoted: str) -> None:
    """Mask the beginning of a key within which a body ends; a body that ends after a word is not changed."""
    body = quoted.format(LONG).encode()
    cut = len(quoted) - 2 + shown
    assert ApiKey(LONG).redact_start(b"bad " + body, 4 + cut) == b"bad " + quoted.format("***").encode()
    assert ApiKey(LONG).redact_start(b'{"a": "Zq7L"}\xff', 13) == b'{"a": "Zq7L"}'
    assert ApiKey("----" + LONG).redact_start(b"an error.", 100) == b"an error."
    assert ApiKey("----" + LONG).redact_start(b"an error: ----Zq", 100) == b"an error: ***"
    assert ApiKey("a/b/" + LONG).redact_start(rb"an error: a\/b\/Zq", 100) == b"an error: ***"
    greek = "-\u0391\u0392\u03a3\u0394-" + LONG  # whose sigma in lower case depends on what follows
    assert ApiKey(greek).redact_start(f"an error: {greek[:6]}Zq".encode(), 100) == b"an error: ***"


@pytest.mark.parametrize("key", ["x" * 50 + "-" + "y" * 50, "-".join("abcdefghijklmnop"), "\\" * 50, LONG])
def test_a_long_word_is_searched_in_linear_time(key: str) -> None:
    """Search a body of 64 KiB that is one word full of parts of the key in far less than a second."""
    start = time.perf_counter()
    for part in (key[:-1], key[: len(key) // 2], key[len(key) // 2 :], key[:1], key):
        body = (part * 65_536)[: 65_536 - len(key)] + key
        assert key.encode() not in ApiKey(key).redact_start(body.encode(), 65_536)
    assert time.perf_counter() - start < 3


async def test_a_function_is_asked_once_for_calls_at_the_same_time() -> None:
    """Concurrent calls share one key, and one refresh of it."""
    asked = 0

    async def provider() -> str:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        return f"key-{asked}"

    source = KeySource(provider)
    first = await asyncio.gather(*(source.get(account="north") for _ in range(10)))
    second = await asyncio.gather(*(source.get(account="north", refused=first[0]) for _ in range(10)))
    assert {key.reveal() for key in first} == {"key-1"}
    assert {key.reveal() for key in second} == {"key-2"}
    assert asked == 2


async def test_a_cancelled_asker_leaves_the_asking_to_the_next() -> None:
    """If the caller that asks is cancelled, the next waiting caller asks, and gets the key."""
    gate = asyncio.Event()

    async def provider() -> str:
        await gate.wait()
        return KEY

    source = KeySource(provider)
    tasks = [asyncio.create_task(source.get(account="north")) for _ in range(2)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    gate.set()
    assert (await tasks[1]).reveal() == KEY
    assert tasks[0].cancelled()


@pytest.mark.parametrize("cache", [None, CachePolicy(0.0)], ids=["no cache", "cache"])
async def test_a_cancelled_call_keeps_no_key(sandbox: Sandbox, cache: CachePolicy | None) -> None:
    """Ask the key function in each later call, also while the task of a cancelled one is held."""
    key, asked = str(sandbox.add_account("north").api_key), 0

    async def provider() -> str:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.001)
        return key

    north = Account("north", provider)
    async with AudiencesClient(base_url=sandbox.base_url, cache=cache) as client:
        cancelled = asyncio.create_task(client.get_audiences(north))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        for _ in range(3):
            await client.get_audiences(north)
    assert asked == 4


async def test_a_sync_function_gives_the_key() -> None:
    """Accept a plain function as well as an async one."""
    assert (await KeySource(lambda: KEY).get(account="north")).reveal() == KEY


@pytest.mark.parametrize("answer", [None, "", "a\nb"])
async def test_a_function_that_gives_no_key(answer: Any) -> None:
    """Validate a function's key like any other."""
    with pytest.raises(ConfigurationError, match="the API key") as caught:
        await KeySource(lambda: answer).get(account="north")
    assert caught.value.account == "north"


async def test_a_function_that_raises() -> None:
    """Raise ConfigurationError with a function's exception as its cause; the next call calls it again."""
    answers = iter([KeyError("vault"), None])

    def provider() -> str:
        failure = next(answers)
        if failure:
            raise failure
        return KEY

    source = KeySource(provider)
    with pytest.raises(ConfigurationError, match="raised KeyError") as caught:
        await source.get(account="north")
    assert isinstance(caught.value.__cause__, KeyError)
    assert (await source.get(account="north")).reveal() == KEY
