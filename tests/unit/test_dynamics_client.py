"""
What is sent where, and what it means that nothing came back: without a network.
"""

from __future__ import annotations

import ssl
from urllib.parse import unquote
from uuid import UUID

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.errors import ConfigurationError, DeliveryError, TransientError
from worker.dynamics.client import DynamicsTarget, body_of, string_literal, url_of
from worker.dynamics.exchange import error_from_exception

URL = "https://hlf.crm4.dynamics.example"
ROW = UUID("00000000-0000-4000-8000-0000000000a1")


@pytest.mark.parametrize("url", [URL, f"{URL}/"])
def test_a_row_is_addressed_by_its_guid(url: str) -> None:
    """
    In the entity set, without quotes, whatever form the GUID came in.
    """
    expected = f"{URL}/api/data/v9.2/contacts({ROW})"
    target = DynamicsTarget(url=url)
    assert url_of(target, ROW) == expected
    assert url_of(target, str(ROW).upper()) == expected


def test_something_that_is_no_guid_gets_no_address_by_guid() -> None:
    """
    It could be anything, also a way to another row.
    """
    with pytest.raises(ValueError, match="UUID"):
        url_of(DynamicsTarget(url=URL), "1)/owner(2")


def test_with_an_alternate_key_a_row_is_addressed_by_its_value() -> None:
    """
    As a string of OData.
    """
    target = DynamicsTarget(url=URL, entity_set="hlf_mentors", key="hlf_mentorno")
    assert url_of(target, ROW) == f"{URL}/api/data/v9.2/hlf_mentors(hlf_mentorno='{ROW}')"
    assert url_of(target, "O'Neil/ Å)").endswith("hlf_mentorno='O%27%27Neil%2F%20%C3%85%29')")


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_no_value_gets_out_of_its_quotes(value: str) -> None:
    """
    Decoded, what is between the outer quotes has only doubled ones, and is the value.
    """
    literal = string_literal(value)
    assert literal.isascii()
    assert not set(literal[1:-1]) & set("'()/?#& ")
    assert unquote(literal)[1:-1].replace("''", "'") == value
    assert str(httpx.URL(f"{URL}/x({literal})")) == f"{URL}/x({literal})"


@pytest.mark.parametrize(
    ("visible", "body"),
    [(True, b'{"hlf_portalvisible":true}'), (False, b'{"hlf_portalvisible":false}')],
)
def test_the_body_is_the_one_column(visible: bool, body: bytes) -> None:  # noqa: FBT001 - a case
    """
    Anything more would count as changed, too.
    """
    assert body_of(DynamicsTarget(url=URL), ROW, visible=visible) == body


def test_a_custom_api_gets_the_row_and_the_value_as_arguments() -> None:
    """
    At the address of its name.
    """
    target = DynamicsTarget(url=URL, operation="action", action="hlf_SetVisibility")
    assert url_of(target, ROW) == f"{URL}/api/data/v9.2/hlf_SetVisibility"
    expected = b'{"MentorId":"00000000-0000-4000-8000-0000000000a1","Visible":false}'
    assert body_of(target, ROW, visible=False) == expected


@pytest.mark.parametrize(
    ("fields", "about"),
    [
        ({"url": "http://hlf.crm4.dynamics.example"}, "The Dynamics URL"),
        ({"url": "https://hlf.example/api/data"}, "The Dynamics URL"),
        ({"entity_set": ""}, "The entity set"),
        ({"entity_set": "contacts(1)"}, "The entity set"),
        ({"entity_set": "contacts/x"}, "The entity set"),
        ({"column": ""}, "The column"),
        ({"column": "a b"}, "The column"),
        ({"column": "å"}, "The column"),
        ({"key": "a='1',b"}, "The alternate key"),
        ({"key": "1a"}, "The alternate key"),
        ({"operation": "delete"}, "The operation"),
        ({"operation": "action"}, "The action"),
        ({"action": "a/b"}, "The action"),
        ({"operation": "action", "action": "a\n"}, "The action"),
    ],
)
def test_a_wrong_target_is_refused_in_one_sentence(fields: dict[str, str], about: str) -> None:
    """
    When it is made, not when it is first used.
    """
    with pytest.raises(ValueError, match=rf"^{about} must [^\n]*\.$"):
        DynamicsTarget(**({"url": URL} | fields))  # type: ignore[arg-type]  # wrong on purpose


def caused_by(error: Exception, cause: Exception) -> Exception:
    """
    An error as a library raises it from another one.
    """
    error.__cause__ = OSError("in between")
    error.__cause__.__context__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (httpx.ConnectError("x"), TransientError, "unreachable"),
        (httpx.ConnectTimeout("x"), TransientError, "unreachable"),
        (httpx.PoolTimeout("x"), TransientError, "unreachable"),
        (httpx.ReadTimeout("x"), TransientError, "timeout"),
        (httpx.WriteTimeout("x"), TransientError, "timeout"),
        (TimeoutError("x"), TransientError, "timeout"),
        (httpx.ReadError("x"), TransientError, "connection_lost"),
        (httpx.WriteError("x"), TransientError, "connection_lost"),
        (httpx.CloseError("x"), TransientError, "connection_lost"),
        (ssl.SSLError("x"), TransientError, "connection_lost"),
        (httpx.RemoteProtocolError("x"), TransientError, "incomplete_answer"),
        (httpx.LocalProtocolError("x"), ConfigurationError, "invalid_address"),
        (httpx.UnsupportedProtocol("x"), ConfigurationError, "invalid_address"),
        (httpx.InvalidURL("x"), ConfigurationError, "invalid_address"),
        (
            caused_by(httpx.ConnectError("x"), ssl.SSLCertVerificationError("x")),
            ConfigurationError,
            "certificate",
        ),
        (caused_by(httpx.ConnectError("x"), ssl.SSLError("x")), TransientError, "unreachable"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_no_answer_has_a_meaning_too(
    error: Exception, kind: type[DeliveryError], code: str
) -> None:
    """
    It names the kind of failure and repeats nothing of it.
    """
    raised = error_from_exception(error, sent=False)
    assert type(raised) is kind
    assert raised.code == code
    assert type(error).__name__ in raised.message
    assert not raised.doubtful


@pytest.mark.parametrize("error", [httpx.ReadTimeout("x"), TimeoutError(), httpx.ReadError("x")])
def test_no_answer_is_doubtful_once_something_was_sent(error: Exception) -> None:
    """
    Dynamics may be working on it.
    """
    assert error_from_exception(error, sent=True).doubtful
