"""
What an answer of Dynamics, or of Entra ID, means: tables and pure functions.

    answer ── status below 400, or 429 ──► what HTTP says
       │
       ├── Dataverse error code ─────────► DATAVERSE_CODES
       ├── 404 without a known code ─────► the record, or the address?
       └── anything else ────────────────► STATUSES, then the hundred it belongs to

A server's own words never get into an error: they may hold GUIDs and names. What is kept is
the status, the error code as a number and, where one is missing, the name of a privilege.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING

from outbox.errors import (
    ConfigurationError,
    DeliveryError,
    PermanentError,
    ThrottledError,
    TransientError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_RETRY_AFTER_SECONDS = 600.0
"""The longest wait that a server may order: 10 minutes. Whoever asks for more is asked again."""

MAX_JSON_BYTES = 64 * 1024
"""Longer bodies are not parsed; no error of Dataverse is nearly as long."""

COMPOSE = 'Microsoft Learn: "Compose HTTP requests and handle errors"'
API_LIMITS = 'Microsoft Learn: "Service protection API limits"'
ERROR_CODES = 'Microsoft Learn: "Web service error codes"'
CLIENT_ERRORS = 'Microsoft Learn: "Troubleshoot Dataverse client errors" (user permissions)'
WEB_API_ERRORS = 'Microsoft Learn: "Troubleshoot Dataverse Web API client errors"'
BULK_ERRORS = 'Microsoft Learn: "Troubleshoot bulk operation errors"'
DUPLICATES = 'Microsoft Learn: "Use optional parameters" (duplicate detection)'
BATCH = 'Microsoft Learn: "Execute batch operations using the Web API"'
DUAL_WRITE = 'Microsoft Learn: "Troubleshoot live synchronization issues" (dual-write)'
CLIENT_CREDENTIALS = (
    'Microsoft Learn: "Microsoft identity platform and the OAuth 2.0 client credentials flow"'
)
SEEN = "seen in published answers of Dataverse; not in Microsoft's lists as far as they were read"
HTTP = "RFC 9110, section 15"
OAUTH = "RFC 6749, section 5.2"
GATEWAYS = "the word of a gateway, which cannot know what became of the request behind it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """
    What a failure is to us.

    Args:
        kind: the class of the error, so what becomes of the event.
        code: lower snake case, stable; machines and support rely on it.
        says: one sentence for people, without its full stop.
        doubtful: the request may yet take effect.
    """

    kind: type[DeliveryError]
    code: str
    says: str
    doubtful: bool = False

    def error(
        self, *details: str, retry_after: float | None = None, doubtful: bool = False
    ) -> DeliveryError:
        """
        The error to raise.

        Args:
            details: short words in brackets after the sentence; never a server's own.
            retry_after: seconds, for a throttled one.
            doubtful: what is known of this one request; the meaning's own doubt remains.
        """
        brackets = f" ({', '.join(details)})" if details else ""
        message = f"{self.says}{brackets}."
        doubt = doubtful or self.doubtful
        if issubclass(self.kind, ThrottledError):
            return self.kind(self.code, message, retry_after=retry_after, doubtful=doubt)
        return self.kind(self.code, message, doubtful=doubt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """
    What it is called that no answer came, by how that was noticed.

    Args:
        incomplete: some came, but no whole answer.
    """

    unreachable: Meaning
    timeout: Meaning
    lost: Meaning
    incomplete: Meaning


@dataclass(frozen=True, slots=True)
class DataverseCode:
    """
    One error code of Dataverse.

    Args:
        hex: as in Microsoft's lists, "0x" and eight digits.
        name: Microsoft's name for it, or the start of its message.
        meaning: what it is to a service that sets one yes/no column.
        source: where this is written.
    """

    hex: str
    name: str
    meaning: Meaning
    source: str


@dataclass(frozen=True, slots=True)
class Status:
    """
    One HTTP status, for answers without a known error code.
    """

    status: int
    meaning: Meaning
    source: str


@dataclass(frozen=True, slots=True)
class OAuthError:
    """
    One `error` word of the token endpoint.
    """

    word: str
    meaning: Meaning
    source: str


# Meanings: answers of Dynamics

THROTTLED = Meaning(
    kind=ThrottledError,
    code="throttled",
    says="Dynamics asks everybody to wait before sending more",
)
UNAVAILABLE = Meaning(
    kind=TransientError,
    code="unavailable",
    says="Dynamics is not available at the moment",
)
SERVER_ERROR = Meaning(
    kind=TransientError,
    code="server_error",
    says="Dynamics failed while handling the request",
)
SERVER_TIMEOUT = Meaning(
    kind=TransientError,
    code="server_timeout",
    says="Dynamics or a gateway before it gave up waiting",
    doubtful=True,
)
BAD_GATEWAY = Meaning(
    kind=TransientError,
    code="bad_gateway",
    says="A gateway before Dynamics got no proper answer from it",
    doubtful=True,
)
UNEXPECTED_ANSWER = Meaning(
    kind=TransientError,
    code="unexpected_answer",
    says="The answer is not the one that Dynamics gives to this request",
    doubtful=True,
)
RECORD_NOT_FOUND = Meaning(
    kind=PermanentError,
    code="record_not_found",
    says="Dynamics has no record of this mentor; check the id that links the two",
)
RECORD_ACCESS_DENIED = Meaning(
    kind=PermanentError,
    code="record_access_denied",
    says="The application may not write this mentor's record in Dynamics; check who owns it",
)
DUPLICATE = Meaning(
    kind=PermanentError,
    code="duplicate",
    says="Dynamics refused the change because of a duplicate record",
)
VERSION_MISMATCH = Meaning(
    kind=PermanentError,
    code="precondition_failed",
    says="A condition of the request is not met in Dynamics",
)
INVALID_VALUE = Meaning(
    kind=PermanentError,
    code="invalid_value",
    says="Dynamics does not accept the value for this record",
)
BAD_REQUEST = Meaning(
    kind=PermanentError,
    code="bad_request",
    says="Dynamics refused the request for this record",
)
FORBIDDEN = Meaning(
    kind=ConfigurationError,
    code="forbidden",
    says="The application lacks a permission in Dynamics; check its security role",
)
NOT_A_USER = Meaning(
    kind=ConfigurationError,
    code="not_a_user",
    says="The application is no application user of this Dynamics environment",
)
UNAUTHORIZED = Meaning(
    kind=ConfigurationError,
    code="unauthorized",
    says="Dynamics does not accept the token, not even a new one",
)
WRONG_ADDRESS = Meaning(
    kind=ConfigurationError,
    code="wrong_address",
    says="There is nothing at this address; check the Dynamics URL, entity set and action",
)
KEY_NOT_DEFINED = Meaning(
    kind=ConfigurationError,
    code="key_not_defined",
    says="The alternate key is not defined on the table in Dynamics",
)
PAYLOAD_REFUSED = Meaning(
    kind=ConfigurationError,
    code="payload_refused",
    says="Dynamics does not know the column, or it is not a yes/no column",
)
METHOD_NOT_ALLOWED = Meaning(
    kind=ConfigurationError,
    code="method_not_allowed",
    says="This address does not take such a request; check the operation and its target",
)
REDIRECT_REFUSED = Meaning(
    kind=ConfigurationError,
    code="redirect_refused",
    says="The server sent us elsewhere, which is never followed; check the address",
)

# Meanings: no answer of Dynamics

UNREACHABLE = Meaning(
    kind=TransientError,
    code="unreachable",
    says="No connection to Dynamics could be made",
)
TIMEOUT = Meaning(
    kind=TransientError,
    code="timeout",
    says="Dynamics did not answer in time",
)
CONNECTION_LOST = Meaning(
    kind=TransientError,
    code="connection_lost",
    says="The connection to Dynamics broke",
)
INCOMPLETE_ANSWER = Meaning(
    kind=TransientError,
    code="incomplete_answer",
    says="The answer of Dynamics is missing, cut short or no HTTP",
)
DYNAMICS_IS_SILENT = Silence(
    unreachable=UNREACHABLE,
    timeout=TIMEOUT,
    lost=CONNECTION_LOST,
    incomplete=INCOMPLETE_ANSWER,
)
CERTIFICATE = Meaning(
    kind=ConfigurationError,
    code="certificate",
    says="The server's certificate is not trusted, has expired or is for another name",
)
INVALID_ADDRESS = Meaning(
    kind=ConfigurationError,
    code="invalid_address",
    says="The request cannot be sent as it is set up; check the addresses in the settings",
)
OTHER_HOST = Meaning(
    kind=ConfigurationError,
    code="other_host",
    says="The token was not sent, because the request goes to another host than it is for",
)

# Meanings: the token endpoint

TOKEN_THROTTLED = Meaning(
    kind=ThrottledError,
    code="token_throttled",
    says="Entra ID asks for fewer token requests",
)
TOKEN_UNAVAILABLE = Meaning(
    kind=TransientError,
    code="token_unavailable",
    says="No token could be fetched from Entra ID at the moment",
)
TOKEN_UNUSABLE = Meaning(
    kind=TransientError,
    code="token_unusable",
    says="Entra ID answered without a token that can be used",
)
TOKEN_REFUSED = Meaning(
    kind=ConfigurationError,
    code="token_refused",
    says="Entra ID refused the token request; check tenant, client id and secret",
)
CLIENT_REFUSED = Meaning(
    kind=ConfigurationError,
    code="token_refused",
    says="Entra ID refused the client id or its secret; the secret may have expired",
)
APPLICATION_REFUSED = Meaning(
    kind=ConfigurationError,
    code="token_refused",
    says="Entra ID does not let this application ask for tokens; check tenant and client id",
)
SCOPE_REFUSED = Meaning(
    kind=ConfigurationError,
    code="token_refused",
    says="Entra ID gives no token for this Dynamics URL; check the URL and the tenant",
)
SECRET_UNREADABLE = Meaning(
    kind=ConfigurationError,
    code="secret_unreadable",
    says="The client secret could not be read",
)

# The tables

DATAVERSE_CODES: tuple[DataverseCode, ...] = (
    DataverseCode("0x80072321", "ThrottlingTimeExceededError", THROTTLED, API_LIMITS),
    DataverseCode("0x80072322", "ThrottlingBurstRequestLimitExceededError", THROTTLED, API_LIMITS),
    DataverseCode("0x80072326", "ThrottlingConcurrencyLimitExceededError", THROTTLED, API_LIMITS),
    DataverseCode("0x8005F103", "Too many requests.", THROTTLED, ERROR_CODES),
    DataverseCode("0x8004A001", "CrmSqlGovernorDatabaseRequestDenied", UNAVAILABLE, ERROR_CODES),
    DataverseCode("0x80073000", "CrmSQLNetworkingError", UNAVAILABLE, ERROR_CODES),
    DataverseCode("0x80044151", "SQL timeout expired", SERVER_ERROR, BULK_ERRORS),
    DataverseCode("0x80044150", "Generic SQL error, also a deadlock", SERVER_ERROR, BULK_ERRORS),
    DataverseCode("0x80040255", "TransactionAborted", SERVER_ERROR, ERROR_CODES),
    DataverseCode("0x80040216", "UnExpected", SERVER_ERROR, ERROR_CODES),
    DataverseCode("0x80040217", "ObjectDoesNotExist", RECORD_NOT_FOUND, CLIENT_ERRORS),
    DataverseCode("0x80060891", "RecordNotFoundByEntityKey", RECORD_NOT_FOUND, SEEN),
    DataverseCode(
        "0x80048306",
        "does not have access right(s) for record",
        RECORD_ACCESS_DENIED,
        CLIENT_ERRORS,
    ),
    DataverseCode("0x80040237", "DuplicateRecord", DUPLICATE, CLIENT_ERRORS),
    DataverseCode("0x80040333", "DuplicateRecordsFound", DUPLICATE, DUPLICATES),
    DataverseCode("0x80060892", "Duplicate alternate key", DUPLICATE, SEEN),
    DataverseCode("0x80060882", "ConcurrencyVersionMismatch", VERSION_MISMATCH, ERROR_CODES),
    DataverseCode("0x80044331", "A validation error occurred", INVALID_VALUE, BATCH),
    DataverseCode("0x80040220", "PrivilegeDenied", FORBIDDEN, CLIENT_ERRORS),
    DataverseCode("0x80040299", "CrmCheckPrivilege failed", FORBIDDEN, CLIENT_ERRORS),
    DataverseCode("0x80040256", "CrmSecurityError", FORBIDDEN, ERROR_CODES),
    DataverseCode("0x80048405", "AccessDenied", FORBIDDEN, ERROR_CODES),
    DataverseCode("0x80072561", "CAPolicyValidationFailed", FORBIDDEN, ERROR_CODES),
    DataverseCode("0x80072559", "AADError", FORBIDDEN, ERROR_CODES),
    DataverseCode("0x80072560", "The user is not a member", NOT_A_USER, DUAL_WRITE),
    DataverseCode("0x8005F101", "AccessTokenExpired", UNAUTHORIZED, ERROR_CODES),
    DataverseCode(
        "0x8006088A", "Resource not found for the segment", WRONG_ADDRESS, WEB_API_ERRORS
    ),
    DataverseCode("0x80060890", "EntityKeyNotDefined", KEY_NOT_DEFINED, ERROR_CODES),
    # The body is the same for every mentor, so what is wrong with it is wrong for all.
    DataverseCode("0x80048D19", "Error identified in Payload", PAYLOAD_REFUSED, SEEN),
)

STATUSES: tuple[Status, ...] = (
    Status(HTTPStatus.BAD_REQUEST, BAD_REQUEST, COMPOSE),
    Status(HTTPStatus.UNAUTHORIZED, UNAUTHORIZED, COMPOSE),
    Status(HTTPStatus.FORBIDDEN, FORBIDDEN, COMPOSE),
    Status(HTTPStatus.METHOD_NOT_ALLOWED, METHOD_NOT_ALLOWED, COMPOSE),
    Status(HTTPStatus.REQUEST_TIMEOUT, SERVER_TIMEOUT, HTTP),
    Status(HTTPStatus.LENGTH_REQUIRED, METHOD_NOT_ALLOWED, HTTP),  # it is so for every mentor
    Status(HTTPStatus.PRECONDITION_FAILED, VERSION_MISMATCH, COMPOSE),
    Status(HTTPStatus.TOO_MANY_REQUESTS, THROTTLED, API_LIMITS),
    Status(HTTPStatus.INTERNAL_SERVER_ERROR, SERVER_ERROR, HTTP),
    Status(HTTPStatus.BAD_GATEWAY, BAD_GATEWAY, GATEWAYS),
    Status(HTTPStatus.SERVICE_UNAVAILABLE, UNAVAILABLE, COMPOSE),
    Status(HTTPStatus.GATEWAY_TIMEOUT, SERVER_TIMEOUT, GATEWAYS),
)

OAUTH_ERRORS: tuple[OAuthError, ...] = (
    OAuthError("invalid_client", CLIENT_REFUSED, OAUTH),
    OAuthError("unauthorized_client", APPLICATION_REFUSED, OAUTH),
    OAuthError("invalid_scope", SCOPE_REFUSED, OAUTH),
    OAuthError("invalid_resource", SCOPE_REFUSED, CLIENT_CREDENTIALS),
    OAuthError("invalid_request", TOKEN_REFUSED, OAUTH),
    OAuthError("invalid_grant", TOKEN_REFUSED, OAUTH),
    OAuthError("unsupported_grant_type", TOKEN_REFUSED, OAUTH),
    OAuthError("access_denied", TOKEN_REFUSED, CLIENT_CREDENTIALS),
    # A passing fault, whatever the status: "The server is temporarily too busy".
    OAuthError("temporarily_unavailable", TOKEN_UNAVAILABLE, CLIENT_CREDENTIALS),
    OAuthError("server_error", TOKEN_UNAVAILABLE, CLIENT_CREDENTIALS),
)

_BY_CODE = {int(row.hex, 16): row.meaning for row in DATAVERSE_CODES}
_BY_STATUS = {int(row.status): row.meaning for row in STATUSES}
_BY_WORD = {row.word: row.meaning for row in OAUTH_ERRORS}
_IN_DOUBT = frozenset(
    {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.BAD_GATEWAY, HTTPStatus.GATEWAY_TIMEOUT}
)
_FIRST_REDIRECT, _FIRST_REFUSAL, _FIRST_FAILURE = 300, 400, 500

_HEX = re.compile(r"0[xX][0-9a-fA-F]{1,8}")
_DECIMAL = re.compile(r"-?[0-9]{1,10}")
_SECONDS = re.compile(r"[0-9]+(\.[0-9]+)?")
# Letters only, and the prefix of a custom table: no GUID, no name with digits gets through.
_PRIVILEGE = re.compile(r"(?<!\w)prv[A-Za-z]{1,64}(?:_[A-Za-z]{1,64}){0,3}(?!\w)")
_LONGEST_DATE = 64  # characters; a date of HTTP has 29


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said:
    """
    The body of an error in one of Dataverse's spellings.

    Args:
        code: unsigned, 32 bits; None if there is none or it is no such number.
        blank: the code is missing, empty or zero, which is frequent.
    """

    code: int | None
    blank: bool
    message: str = field(repr=False)


def error_from_answer(
    status: int, headers: Mapping[str, str], body: bytes, *, now: datetime
) -> DeliveryError:
    """
    What an answer of Dynamics means that is not the one hoped for.

    Args:
        status: of HTTP; any number.
        headers: any spelling of their names.
        body: as received, perhaps cut; anything.
        now: with a time zone; what a date in Retry-After is compared to.
    """
    said = _said(body)
    meaning = _meaning(status, said)
    details = [f"HTTP {status}"]
    if said and said.code:
        details.append(f"0x{said.code:08x}")
    if said and meaning is FORBIDDEN and (privilege := _PRIVILEGE.search(said.message)):
        details.append(f"missing {privilege.group()}")
    return meaning.error(
        *details,
        retry_after=retry_after_seconds(_header(headers, "retry-after"), now=now),
        doubtful=status in _IN_DOUBT,
    )


def error_from_token_answer(
    status: int, headers: Mapping[str, str], body: bytes, *, now: datetime
) -> DeliveryError:
    """
    What an answer of the token endpoint means that brought no usable token.

    Only the status and OAuth's `error` word count. The AADSTS numbers of Entra ID do not:
    Microsoft Learn, "Microsoft Entra authentication and authorization error codes", says that
    clients should not react to them. Nothing is ever doubtful here: no data was sent.

    Args:
        now: with a time zone; what a date in Retry-After is compared to.
    """
    details = [f"HTTP {status}"]
    meaning = _token_meaning(status)
    word = (json_object(body) or {}).get("error")
    if isinstance(word, str) and word in _BY_WORD:
        details.append(word)
        if meaning is TOKEN_REFUSED:
            meaning = _BY_WORD[word]
    return meaning.error(
        *details, retry_after=retry_after_seconds(_header(headers, "retry-after"), now=now)
    )


def retry_after_seconds(value: str | None, *, now: datetime) -> float | None:
    """
    How long a Retry-After header asks to keep away.

    Seconds in Dataverse's own answers; RFC 9110, section 10.2.3, also allows a date. The
    result is clamped to [0, 600]: a date in the past is 0, anything beyond 10 minutes is 10
    minutes. A negative number is no legal value, so it counts as missing.

    Args:
        value: of the header, or None if there is none.
        now: with a time zone.

    Returns:
        Seconds, or None if the header does not say.
    """
    text = (value or "").strip()
    if _SECONDS.fullmatch(text):
        return min(float(text), MAX_RETRY_AFTER_SECONDS)
    moment = _http_date(text)
    if moment is None:
        return None
    return min(max((moment - now).total_seconds(), 0.0), MAX_RETRY_AFTER_SECONDS)


def json_object(body: bytes) -> dict[str, object] | None:
    """
    A body as a JSON object, or None if it is none, or is longer than `MAX_JSON_BYTES`.
    """
    if len(body) > MAX_JSON_BYTES:
        return None
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _http_date(text: str) -> datetime | None:
    if not text or len(text) > _LONGEST_DATE:
        return None
    try:
        moment = parsedate_to_datetime(text)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _meaning(status: int, said: _Said | None) -> Meaning:
    if status < _FIRST_REFUSAL:
        return UNEXPECTED_ANSWER if status < _FIRST_REDIRECT else REDIRECT_REFUSED
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return THROTTLED
    if said and said.code in _BY_CODE:
        return _BY_CODE[said.code]
    if status == HTTPStatus.NOT_FOUND:
        return _missing(said)
    return _BY_STATUS.get(status) or _unlisted(status)


def _missing(said: _Said | None) -> Meaning:
    """
    A 404 is about the record only where Dataverse says so; else the address is wrong.

    The documentation's own example of a missing record has an empty code. Source: Microsoft
    Learn, "Perform conditional operations using the Web API".
    """
    if said and said.blank and "does not exist" in said.message.casefold():
        return RECORD_NOT_FOUND
    return WRONG_ADDRESS


def _unlisted(status: int) -> Meaning:
    if status < _FIRST_FAILURE:
        return Meaning(
            kind=PermanentError, code=f"http_{status}", says="Dynamics refused the request"
        )
    return Meaning(kind=TransientError, code=f"http_{status}", says="Dynamics failed to answer")


def _token_meaning(status: int) -> Meaning:
    if status < _FIRST_REFUSAL:
        return TOKEN_UNUSABLE if status < _FIRST_REDIRECT else REDIRECT_REFUSED
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return TOKEN_THROTTLED
    if status == HTTPStatus.REQUEST_TIMEOUT or status >= _FIRST_FAILURE:
        return TOKEN_UNAVAILABLE
    return TOKEN_REFUSED


def _said(body: bytes) -> _Said | None:
    """
    The error in a body, or None if it is in none of Dataverse's spellings.

    `{"error": {"code", "message"}}` today; `ErrorCode` and `Message` at the top in older
    answers. The code "is frequently empty". Source: Microsoft Learn, "Compose HTTP requests
    and handle errors".
    """
    document = _lower_keys(json_object(body) or {})
    error = document.get("error")
    if isinstance(error, dict):
        fields = _lower_keys(error)
    elif "errorcode" in document:
        fields = document
    else:
        return None
    raw = fields.get("code", fields.get("errorcode"))
    code = _code(raw)
    message = fields.get("message")
    return _Said(
        code=code or None,
        blank=raw in (None, "") or code == 0,
        message=message if isinstance(message, str) else "",
    )


def _code(raw: object) -> int | None:
    """
    An error code as an unsigned number of 32 bits, from hexadecimal or (signed) decimal.
    """
    match raw:
        case bool():
            return None
        case int():
            number = raw
        case str() if _HEX.fullmatch(raw.strip()):
            number = int(raw, 16)
        case str() if _DECIMAL.fullmatch(raw.strip()):
            number = int(raw)
        case _:
            return None
    return number & 0xFFFF_FFFF if -(2**31) <= number < 2**32 else None


def _lower_keys(fields: dict[str, object]) -> dict[str, object]:
    return {name.lower(): value for name, value in fields.items()}


def _header(headers: Mapping[str, str], wanted: str) -> str | None:
    return next((value for name, value in headers.items() if name.lower() == wanted), None)
