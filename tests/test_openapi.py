"""The sandbox against the service's documentation: schemathesis sends it requests over real sockets."""

from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeAlias

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import Case, CheckFunction, Response
from schemathesis.core.failures import Failure, MalformedJson, ServerError
from schemathesis.errors import FailureGroup
from schemathesis.openapi.checks import JsonSchemaError, UndefinedContentType, UndefinedStatusCode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from audiences_async import Account
from audiences_async.sandbox import EXAMPLE_AUDIENCES, Answer, Sandbox, many_audiences
from audiences_async.sandbox.contract import openapi
from audiences_async.structuring import decode

AnyCase: TypeAlias = Case[Any]

# Without the checks that no error response can pass: "not a server error" and "accepts valid data".
CONFORMANCE: Final[list[CheckFunction]] = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
RESPONSES: Final[Mapping[str, Any]] = openapi()["paths"]["/audiences"]["get"]["responses"]
EXAMPLES: Final[Mapping[int, Any]] = {
    int(status): response["content"]["application/json"]["example"] for status, response in RESPONSES.items()
}
OTHER_METHODS: Final = {"DELETE", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"}
STATIC, DYNAMIC = EXAMPLE_AUDIENCES

contract = schemathesis.openapi.from_dict(openapi())
# One sandbox for all cases of a test, on purpose.
reproducible = settings(
    derandomize=True,
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def bearer(account: Account) -> dict[str, str]:
    """Return the header that opens the account."""
    assert isinstance(account.api_key, str)
    return {"Authorization": f"Bearer {account.api_key}"}


def get(sandbox: Sandbox, headers: dict[str, str], checks: list[CheckFunction] | None = None) -> Response:
    """Send one plain ``GET /audiences`` and check it; ``None`` means all default checks."""
    case: AnyCase = contract["/audiences"]["GET"].Case()
    return case.call_and_validate(sandbox.base_url, headers=headers, checks=checks)


def failures(
    sandbox: Sandbox, account: Account, answer: Answer, checks: list[CheckFunction] | None = None
) -> set[type[Failure]]:
    """Return the failures of the checks on this answer."""
    sandbox.script("north", answer)
    with pytest.raises(FailureGroup) as caught:
        get(sandbox, headers=bearer(account), checks=checks)
    assert sandbox.requests[0].answer == answer.status
    return {type(failure) for failure in caught.value.exceptions}


def usual(response: Response, status: int) -> int:
    """Return the sandbox's answer with this status; some cases leave the key out."""
    if response.request.method != "GET":
        return 405
    return status if "Authorization" in response.request.headers else 401


def without(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the record without one field."""
    return {key: value for key, value in record.items() if key != name}


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """Yield a running sandbox."""
    with Sandbox() as running:
        yield running


@pytest.fixture
def account(sandbox: Sandbox) -> Account:
    """Open an account with the audiences of the service's page."""
    return sandbox.add_account("north")


@pytest.fixture
def asked(sandbox: Sandbox) -> Iterator[None]:
    """Fail a test in which schemathesis did not use the key for the audiences and for every other method."""
    yield
    assert {"GET", *OTHER_METHODS} <= {request.method for request in sandbox.seen("north")}


@pytest.mark.once
@contract.parametrize()
@pytest.mark.usefixtures("asked")
@reproducible
def test_every_check_of_schemathesis_passes(case: AnyCase, sandbox: Sandbox, account: Account) -> None:
    """Pass all default checks in each case; after a 200, one repeats it without a key and with a wrong one."""
    before = len(sandbox.requests)
    response = case.call_and_validate(sandbox.base_url, headers=bearer(account))
    first, *again = [(seen.method, seen.account, seen.answer) for seen in sandbox.requests[before:]]
    assert first[2] == response.status_code == usual(response, 200)
    assert set(again) <= {("GET", None, 401)}
    # Cases with a malformed content type skip the check that repeats the request.
    if response.status_code == 200 and "Content-Type" not in response.request.headers:
        assert len(again) >= 2


@pytest.mark.once
@contract.parametrize()
@reproducible
def test_made_up_keys_are_refused(case: AnyCase, sandbox: Sandbox, account: Account) -> None:
    """Pass all default checks too without the account's key, and never get its audiences."""
    response = case.call_and_validate(sandbox.base_url)
    assert response.status_code == (401 if case.method == "GET" else 405)
    assert sandbox.seen(account.name) == []
    if case.method == "GET":
        assert response.json()["status"] == 401
        assert response.json()["description"] == EXAMPLES[401]["description"]


@pytest.mark.once
@pytest.mark.parametrize("status", [400, 404, 429, 500])
@contract.parametrize()
@pytest.mark.usefixtures("asked")
@reproducible
def test_errors_conform(case: AnyCase, status: int, sandbox: Sandbox, account: Account) -> None:
    """Return the body documented for each error's status, with the page's own text."""
    sandbox.script("north", Answer(status))
    response = case.call_and_validate(sandbox.base_url, headers=bearer(account), checks=CONFORMANCE)
    assert response.status_code == usual(response, status)
    if response.status_code == status:
        assert response.json()["status"] == status
        assert response.json()["description"] == EXAMPLES[status]["description"]


@pytest.mark.parametrize("status", sorted(EXAMPLES))
def test_the_examples_of_the_page_conform(status: int, sandbox: Sandbox, account: Account) -> None:
    """Validate the page's own example of each status by the schema of that status."""
    sandbox.script("north", Answer(status, EXAMPLES[status]))
    response = get(sandbox, headers=bearer(account), checks=CONFORMANCE)
    assert response.status_code == status
    assert response.json() == EXAMPLES[status]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param([], id="none"),
        pytest.param(list(many_audiences("north", 1000)), id="many"),
        pytest.param([{**STATIC, "user_count": 0, "name": ""}], id="no-users-no-name"),
        pytest.param([{**STATIC, "user_count": 2**70}], id="more-than-64-bits"),
        pytest.param([{**DYNAMIC, "created_time": "2024-03-19T10:45:41.6038344Z"}], id="seven-digits"),
        pytest.param([{**STATIC, "owner": {"id": 7}}, {**DYNAMIC, "user_count": 3}], id="further-fields"),
    ],
)
def test_what_the_document_allows_the_client_reads(data: list[Any], sandbox: Sandbox, account: Account) -> None:
    """Bodies at the edges of the document pass its checks, and give the client every record."""
    sandbox.add_account("south", audiences=data)
    response = get(sandbox, headers={"Authorization": "Bearer sandbox-key-south"}, checks=CONFORMANCE)
    assert response.json()["data"] == data
    assert [audience.id for audience in decode(response.content)] == [record["id"] for record in data]


@pytest.mark.parametrize(
    "record",
    [
        *(pytest.param(without(STATIC, name), id=f"static-without-{name}") for name in STATIC),
        *(pytest.param(without(DYNAMIC, name), id=f"dynamic-without-{name}") for name in DYNAMIC),
        *(
            pytest.param({**STATIC, "user_count": count}, id=f"user_count-{count!r}")
            for count in (-1, 1.5, 100.0, "100", True, None)
        ),
        *(
            pytest.param({**DYNAMIC, "created_time": time}, id=f"created_time-{time!r}")
            for time in ("yesterday", "2025-10-01", "2025-13-01T09:10:00Z", 1759309800, None)
        ),
        *(pytest.param({**STATIC, "id": identifier}, id=f"id-{identifier!r}") for identifier in ("", 31234, None)),
        *(pytest.param({**STATIC, "type": kind}, id=f"type-{kind!r}") for kind in ("static", "Other", "", None)),
        pytest.param({**STATIC, "name": None}, id="name-None"),
        pytest.param("31234", id="text"),
    ],
)
def test_a_wrong_record_is_refused(record: Any, sandbox: Sandbox, account: Account) -> None:
    """Fail the check for one record that breaks the schema, after a valid one."""
    wrong = Answer(200, {**EXAMPLES[200], "data": [DYNAMIC, record]})
    assert JsonSchemaError in failures(sandbox, account, wrong)


@pytest.mark.parametrize(
    "body",
    [
        *(pytest.param(without(EXAMPLES[200], name), id=f"without-{name}") for name in EXAMPLES[200]),
        pytest.param({**EXAMPLES[200], "status": 200}, id="status-integer"),
        pytest.param({**EXAMPLES[200], "data": None}, id="data-null"),
        pytest.param({**EXAMPLES[200], "data": {}}, id="data-object"),
        pytest.param([STATIC, DYNAMIC], id="no-envelope"),
    ],
)
def test_a_wrong_envelope_is_refused(body: Any, sandbox: Sandbox, account: Account) -> None:
    """Fail the check for a 200 whose envelope breaks the schema."""
    assert failures(sandbox, account, Answer(200, body)) == {JsonSchemaError}


@pytest.mark.parametrize("status", [400, 404, 429, 500])
@pytest.mark.parametrize(
    "wrong",
    [
        {"status": "400"},
        {"status": None},
        {"description": None},
        {"response_time": "now"},
        {"response_time": None},
    ],
)
def test_a_wrong_error_is_refused(status: int, wrong: dict[str, Any], sandbox: Sandbox, account: Account) -> None:
    """Fail the check for an error whose envelope breaks the schema."""
    answer = Answer(status, {**EXAMPLES[status], **wrong})
    assert failures(sandbox, account, answer, checks=CONFORMANCE) == {JsonSchemaError}


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (Answer(200, b""), MalformedJson),
        (Answer(200, "<html>"), MalformedJson),
        (Answer(200, headers={"Content-Type": "text/html"}), UndefinedContentType),
        (Answer(418), UndefinedStatusCode),
        (Answer(201, EXAMPLES[200]), UndefinedStatusCode),
        (Answer(500), ServerError),
    ],
)
def test_an_undocumented_answer_is_refused(
    answer: Answer, failure: type[Failure], sandbox: Sandbox, account: Account
) -> None:
    """Other statuses, other content types, and bodies that are not JSON fail the checks."""
    assert failure in failures(sandbox, account, answer)


def test_the_document_is_openapi() -> None:
    """Validate the document as OpenAPI 3.0: one operation, which needs a bearer token and has no parameters."""
    contract.validate()
    document = openapi()
    assert document["openapi"].startswith("3.0.")
    assert document["servers"] == [{"url": "https://api.commbox.io"}]
    assert list(document["paths"]) == ["/audiences"]
    assert list(document["paths"]["/audiences"]) == ["get"]
    assert "parameters" not in document["paths"]["/audiences"]["get"]
    assert document["security"] == [{"bearer": []}]
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"


@pytest.mark.parametrize("part", ["info", "paths"])
def test_a_broken_document_is_not_openapi(part: str) -> None:
    """Refuse a document without a part that OpenAPI requires, by the same validation."""
    broken = schemathesis.openapi.from_dict(without(openapi(), part))
    with pytest.raises(jsonschema_rs.ValidationError, match=part):
        broken.validate()


def test_the_document_and_the_sandbox_show_the_same_audiences() -> None:
    """Show the records of the service's page both in the document's example and in the sandbox's usual answer."""
    assert EXAMPLES[200]["data"] == list(EXAMPLE_AUDIENCES)


def test_each_document_is_a_copy() -> None:
    """Change one document without changing the next."""
    openapi()["paths"].clear()
    assert list(openapi()["paths"]) == ["/audiences"]
