"""
Who may: logging in at a provider on loopback, sessions, tokens, roles and organisations.
"""

from __future__ import annotations

import base64
import hmac
import json
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import ECKey

from tests.openid import CLIENT_ID, Site, new_key, person, site_with_login
from worker.coordinator import sessions, tokens
from worker.coordinator.access import Login

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.factories import World

STATUS = "/api/v1/status"


@pytest.fixture
async def site(world: World) -> AsyncIterator[Site]:
    """
    Somebody called Ada, a coordinator of HLF, would log in.
    """
    async with site_with_login(world) as site:
        yield site


async def at_the_provider(begun: httpx.Response) -> httpx.Response:
    """
    Where a browser comes that was sent to log in.
    """
    async with httpx.AsyncClient() as browser:
        return await browser.get(begun.headers["location"])


# ------------------------------------------------------------------------------- people


async def test_a_person_logs_in_and_comes_where_they_wanted_to(site: Site) -> None:
    """
    By way of the provider, with state, nonce and PKCE; then the cookie is enough.
    """
    async with site.browser() as browser:
        answer = await browser.get("/login", params={"next": STATUS})
        assert answer.status_code == 200
        assert answer.json()["in_order"] == 0
        assert str(answer.url) == site.url + STATUS
        assert (await browser.get(STATUS)).status_code == 200
    assert "/token" in site.provider.asked
    claims = await site.world.value("SELECT claims FROM outbox.web_sessions")
    assert claims == {
        "subject": "ada",
        "name": "Ada",
        "organization_id": str(site.world.hlf),
        "role": "coordinator",
    }


async def test_whoever_is_not_known_is_sent_to_the_login_or_told(site: Site) -> None:
    """
    A person's browser goes there, a program gets a problem.
    """
    async with httpx.AsyncClient(base_url=site.url) as nobody:
        page = await nobody.get("/mentors/1")
        assert (page.status_code, page.headers["location"]) == (303, "/login?next=/mentors/1")
        program = await nobody.get(STATUS)
    assert program.status_code == 401
    assert program.headers["www-authenticate"] == "Bearer"
    assert program.headers["content-type"] == "application/problem+json"
    assert program.json()["type"] == "urn:hlf-sync:problem:unauthorized"


async def test_the_cookies_are_for_this_host_alone(site: Site) -> None:
    """
    No script reads them and no other site's form sends them; behind https they say so by name.
    """
    async with httpx.AsyncClient(base_url=site.url) as browser:
        begun = await browser.get("/login")
    cookie = begun.headers["set-cookie"].lower()
    assert cookie.startswith("login=")
    for part in ("httponly", "samesite=lax", "path=/", "max-age=600"):
        assert part in cookie
    secure = Login(None, None, None, url="https://sync.example")  # type: ignore[arg-type]
    assert (secure.session_cookie, secure.login_cookie) == ("__Host-session", "__Host-login")


async def test_a_session_is_stored_by_its_hash_and_ends(site: Site) -> None:
    """
    By logging out, by age, by idleness.
    """
    async with site.browser() as browser:
        await browser.get("/login", params={"next": STATUS})
        token = browser.cookies["session"]
        stored = bytes(await site.world.value("SELECT token_hash FROM outbox.web_sessions"))
        assert token.encode() not in stored
        assert len(token) >= 43

        for end in (
            "seen_at = now() - interval '2 hours'",
            "seen_at = now(), expires_at = now() - interval '1 s'",
        ):
            await site.world.execute(f"UPDATE outbox.web_sessions SET {end}")  # noqa: S608
            assert (await browser.get(STATUS)).status_code == 401
        await site.world.execute(
            "UPDATE outbox.web_sessions SET expires_at = now() + interval '1 h'"
        )
        assert (await browser.get(STATUS)).status_code == 200

        out = await browser.post(
            "/logout", headers={"Sec-Fetch-Site": "same-origin"}, follow_redirects=False
        )
        assert (out.status_code, out.headers["location"]) == (303, "/logged-out")
        assert await site.world.value("SELECT count(*) FROM outbox.web_sessions") == 0
        browser.cookies.set("session", token)
        assert (await browser.get(STATUS)).status_code == 401


async def test_a_page_that_is_used_keeps_its_session(site: Site) -> None:
    """
    Its last use is noted, a minute exactly.
    """
    async with site.browser() as browser:
        await browser.get("/login", params={"next": STATUS})
        await site.world.execute(
            "UPDATE outbox.web_sessions SET seen_at = now() - interval '50 min'"
        )
        assert (await browser.get(STATUS)).status_code == 200
    assert await site.world.value(
        "SELECT seen_at > now() - interval '1 min' FROM outbox.web_sessions"
    )


async def test_sessions_that_ended_are_forgotten(site: Site) -> None:
    """
    A page at a time.
    """
    async with site.browser() as browser:
        await browser.get("/login", params={"next": STATUS})
    async with site.world.engine.begin() as connection:
        assert await sessions.forget(connection, limit=10) == 0
    await site.world.execute("UPDATE outbox.web_sessions SET expires_at = now() - interval '1 s'")
    async with site.world.engine.begin() as connection:
        assert await sessions.forget(connection, limit=10) == 1


@pytest.mark.parametrize(
    "target",
    [
        "//evil.example/",
        "/\\evil.example",
        "https://evil.example",
        "evil",
        "",
        "/login",
        "/\r\nX: y",
    ],
)
async def test_a_login_ends_on_a_page_of_ours(site: Site, target: str) -> None:
    """
    Wherever a link said it would.
    """
    async with httpx.AsyncClient(base_url=site.url) as browser:
        begun = await browser.get("/login", params={"next": target})
        there = await at_the_provider(begun)
        back = await browser.get(there.headers["location"])
    assert (back.status_code, back.headers["location"]) == (303, "/")


async def test_a_login_that_somebody_else_began_is_refused(site: Site) -> None:
    """
    A callback with a stranger's code and state logs nobody in as the stranger.
    """
    async with httpx.AsyncClient(base_url=site.url) as stranger:
        begun = await stranger.get("/login")
        there = await at_the_provider(begun)
        callback = there.headers["location"]
    async with httpx.AsyncClient(base_url=site.url) as victim:
        assert (await victim.get(callback)).status_code == 400
        await victim.get("/login")
        assert (await victim.get(callback)).status_code == 400
        assert "session" not in victim.cookies
    assert await site.world.value("SELECT count(*) FROM outbox.web_sessions") == 0


async def test_a_code_is_good_once(site: Site) -> None:
    """
    And not without the verifier that the browser's seed gives.
    """
    async with httpx.AsyncClient(base_url=site.url) as browser:
        begun = await browser.get("/login")
        asked = parse_qs(urlsplit(begun.headers["location"]).query)
        assert asked["code_challenge_method"] == ["S256"]
        assert asked["response_type"] == ["code"]
        there = await at_the_provider(begun)
        seed = browser.cookies["login"]
        assert (await browser.get(there.headers["location"])).status_code == 303
        browser.cookies.set("login", seed)
        again = await browser.get(there.headers["location"])
    assert again.status_code == 400


SPOILT: dict[str, dict[str, Any]] = {
    "another login's nonce": {"nonce": "x"},
    "no nonce": {"nonce": None},
    "another issuer": {"iss": "https://evil.example"},
    "no issuer": {"iss": None},
    "another audience": {"aud": "somebody-else"},
    "no audience": {"aud": None},
    "another client's": {"aud": [CLIENT_ID, "other"], "azp": "other"},
    "expired": {"exp": int(time.time()) - 120},
    "no end": {"exp": None},
    "not yet valid": {"nbf": int(time.time()) + 600},
    "issued in the future": {"iat": int(time.time()) + 600},
    "nobody's": {"sub": None},
}


@pytest.mark.parametrize("spoilt", SPOILT.values(), ids=SPOILT)
async def test_an_id_token_with_something_wrong_logs_nobody_in(
    site: Site, spoilt: dict[str, Any]
) -> None:
    """
    Whatever its signature says.
    """
    site.provider.spoil = spoilt
    async with site.browser() as browser:
        assert (await browser.get("/login")).status_code == 400
        assert "session" not in browser.cookies


@pytest.mark.parametrize(
    "claims",
    [
        {"app_metadata": None},
        {"app_metadata": {"hlf_role": "coordinator"}},
        {"app_metadata": {"hlf_role": "coordinator", "organization_id": "HLF"}},
        {"app_metadata": {"organization_id": str(uuid4())}},
        {"app_metadata": {"organization_id": str(uuid4()), "hlf_role": "admin"}},
        {"app_metadata": [], "user_metadata": person("x", uuid4(), "viewer")["app_metadata"]},
    ],
)
async def test_whoever_has_no_role_here_is_told_so(site: Site, claims: dict[str, Any]) -> None:
    """
    As a person and as an app; nothing is shown, and no session begins.
    """
    site.provider.claims |= claims
    async with site.browser() as browser:
        assert (await browser.get("/login")).status_code == 403
        assert "session" not in browser.cookies
    answer = await site.get(site.provider.token(), STATUS)
    assert (answer.status_code, answer.json()["type"]) == (403, "urn:hlf-sync:problem:forbidden")


async def test_without_its_provider_nobody_logs_in_and_whoever_is_in_stays(site: Site) -> None:
    """
    An outage there is no outage here.
    """
    async with site.browser() as browser:
        await browser.get("/login", params={"next": STATUS})
        site.provider.answers = False
        site.clock[0] += tokens.METADATA_SECONDS + 1
        assert (await browser.get(STATUS)).status_code == 200
        assert (await browser.get("/login")).status_code == 503
    assert (await site.get(site.provider.token(), STATUS)).status_code == 503


@pytest.mark.parametrize(
    "metadata",
    [
        {"issuer": "https://evil.example"},
        {"token_endpoint": "http://evil.example/token"},
        {"authorization_endpoint": None},
        {"jwks_uri": 5},
    ],
)
async def test_a_provider_that_speaks_for_another_is_not_used(
    site: Site, metadata: dict[str, Any]
) -> None:
    """
    Nor one that would send people's codes in the clear.
    """
    site.provider.metadata = metadata
    async with httpx.AsyncClient(base_url=site.url) as browser:
        assert (await browser.get("/login")).status_code == 503


# --------------------------------------------------------------------------------- apps


async def test_an_app_with_a_token_is_its_user(site: Site) -> None:
    """
    Signed by any key that the provider publishes, of either kind.
    """
    assert (await site.get(site.provider.token(), STATUS)).status_code == 200
    elliptic = ECKey.generate_key("P-256", private=True)
    elliptic.ensure_kid()
    site.provider.keys.append(elliptic)
    site.clock[0] += tokens.SELDOM_SECONDS + 1
    assert (await site.get(site.provider.token(key=elliptic), STATUS)).status_code == 200


@pytest.mark.parametrize(
    "spoilt",
    [spoilt for name, spoilt in SPOILT.items() if "nonce" not in name and "azp" not in spoilt],
)
async def test_a_token_with_something_wrong_is_refused(site: Site, spoilt: dict[str, Any]) -> None:
    """
    As it would be at a login.
    """
    answer = await site.get(site.provider.token(**spoilt), STATUS)
    assert answer.status_code == 401


async def test_a_token_that_the_provider_did_not_sign_is_refused(site: Site) -> None:
    """
    No signature, a stranger's, the public key taken for a shared secret, a broken one.
    """
    public = site.provider.keys[0]
    good = site.provider.token()
    claims = jwt.decode(good, public).claims
    stranger = new_key()
    confused = f"{_part({'alg': 'HS256', 'kid': public.kid})}.{good.split('.')[1]}"
    digest = hmac.digest(public.as_pem(private=False), confused.encode(), "sha256")
    none = ".".join([_part({"alg": "none"}), good.split(".")[1], ""])
    for token in (
        none,
        site.provider.token(key=stranger),
        site.provider.token(key=stranger, header={"kid": public.kid}),
        f"{confused}.{_base64(digest)}",
        good[:-8] + "AAAAAAAA",
        good.split(".")[0] + "." + _part(claims | {"sub": "eve"}) + "." + good.split(".")[2],
        "a.b.c",
        "..",
        "x",
        "a" * 20_000,
    ):
        assert (await site.get(token, STATUS)).status_code == 401, token[:60]
    assert (await site.get(good, STATUS)).status_code == 200


def _part(document: dict[str, Any]) -> str:
    return _base64(json.dumps(document).encode())


def _base64(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


async def test_keys_are_rotated_without_a_restart(site: Site) -> None:
    """
    An unknown key is looked for, seldom; a withdrawn one is forgotten.
    """
    old = site.provider.keys[0]
    assert (await site.get(site.provider.token(), STATUS)).status_code == 200
    asked = site.provider.asked.count("/keys")

    site.provider.keys.insert(0, new_key())
    for _ in range(5):  # whoever makes up keys does not make us ask each time
        assert (await site.get(site.provider.token(), STATUS)).status_code == 401
    assert site.provider.asked.count("/keys") == asked

    site.clock[0] += tokens.SELDOM_SECONDS + 1
    assert (await site.get(site.provider.token(), STATUS)).status_code == 200
    assert site.provider.asked.count("/keys") == asked + 1

    site.provider.keys.remove(old)
    site.clock[0] += tokens.KEYS_SECONDS + 1
    assert (await site.get(site.provider.token(key=old), STATUS)).status_code == 401


async def test_a_wrong_token_is_not_mended_by_a_session(site: Site) -> None:
    """
    Whoever sends one is judged by it.
    """
    async with site.browser() as browser:
        await browser.get("/login", params={"next": STATUS})
        answer = await browser.get(STATUS, headers={"Authorization": "Bearer x.y.z"})
        assert answer.status_code == 401
        assert (
            await browser.get(STATUS, headers={"Authorization": "Basic eDp5"})
        ).status_code == 401


async def test_a_token_of_another_organisation_sees_nothing_of_ours(site: Site) -> None:
    """
    Each sees its own.
    """
    mentor = await site.world.mentor()
    await site.world.certifications.expire(mentor.certification_id)
    ours = site.provider.token()
    theirs = site.provider.token(**person("eve", site.world.other, "coordinator"))

    assert (await site.get(ours, STATUS)).json()["waiting"] == 1
    assert (await site.get(theirs, STATUS)).json()["waiting"] == 0
    path = f"/api/v1/mentors/{mentor.id}/portal"
    assert (await site.get(ours, path)).json()["portal"] == "pending"
    assert (await site.get(theirs, path)).status_code == 404
