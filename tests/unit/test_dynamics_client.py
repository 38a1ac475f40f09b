"""
What is sent where, and what it means that nothing came back: without a network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote
from uuid import UUID

import pytest
import yarl
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

from outbox.errors import ConfigurationError, DeliveryError, TransientError
from worker.dynamics.client import DynamicsTarget, body_of, string_literal, url_of
from worker.dynamics.exchange import error_from_silence
from worker.dynamics.token import EntraAuth
from worker.http_client import Answer, HttpClient, NoAnswerError

if TYPE_CHECKING:
    from worker.http_client import Outgoing, Reason, Trail

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


@pytest.mark.parametrize(
    "url", ["https://HLF.crm4.Dynamics.example:443", "https://høring.example/"]
)
async def test_however_an_address_is_spelled_the_token_goes_there(url: str) -> None:
    """
    And a batch's parts begin with a path.
    """
    auth = EntraAuth(
        authority=URL,
        tenant_id="a.example",
        client_id="a",
        secret=lambda: "s",
        resource=url,
        http=WithToken(),
    )
    target = DynamicsTarget(url=url)
    address = yarl.URL(url_of(target, ROW), encoded=True)
    assert await auth.authorization(address) == "Bearer t"
    assert target.base_url.isascii()
    assert target.base_url == target.base_url.lower()


class WithToken(HttpClient):
    """
    An authority in memory.
    """

    @override
    async def send(self, outgoing: Outgoing, trail: Trail | None = None) -> Answer:
        """
        The same for all.
        """
        return Answer(status=200, headers={}, body=b'{"access_token": "t", "expires_in": 3600}')


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
    assert yarl.URL(f"{URL}/x({literal})", encoded=True).raw_path == f"/x({literal})"


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


@pytest.mark.parametrize(
    ("reason", "kind", "code"),
    [
        ("address", ConfigurationError, "invalid_address"),
        ("certificate", ConfigurationError, "certificate"),
        ("unreachable", TransientError, "unreachable"),
        ("lost", TransientError, "connection_lost"),
        ("incomplete", TransientError, "incomplete_answer"),
    ],
)
def test_no_answer_has_a_meaning_too(reason: Reason, kind: type[DeliveryError], code: str) -> None:
    """
    It names the kind of failure; whether it is doubtful depends on what was sent.
    """
    silence = NoAnswerError(reason, "SomeError")
    for sent in (False, True):
        error = error_from_silence(silence, sent=sent)
        assert type(error) is kind
        assert error.code == code
        assert "SomeError" in error.message
        assert error.doubtful is sent
