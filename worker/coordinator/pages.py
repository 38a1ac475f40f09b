"""
The pages: what is looked at by GET, what is done by the forms on them.

Everything works without a script: a form is posted, and leads back to a page that says what it
came to. The script posts the same forms and asks for the sentences alone.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode
from uuid import UUID

from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from typing_extensions import override

from worker.coordinator import alerts, mentors, wording
from worker.coordinator.actions import NoteNeededError
from worker.coordinator.callers import require_coordinator
from worker.coordinator.views import NotFoundError, View, stream_address, view_of
from worker.database import reading
from worker.errors import NotAllowedError, UnknownFailureError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import Scope

    from worker.coordinator.callers import Caller
    from worker.coordinator.retry import Retried
    from worker.coordinator.views import Views
    from worker.coordinator.wording import Language, Words

LANGUAGE_COOKIE = "lang"
YEAR_SECONDS = 365 * 86400

COUNTED = ("started", "under_way", "resolved", "gone")
PLAIN = (
    "nothing",
    "unknown",
    "handled",
    "already_resolved",
    "note_needed",
    "none_chosen",
    "not_allowed",
)
"""What a page may be asked to say about what was done, by the keys of `outcome`."""


def routes() -> list[BaseRoute]:
    """
    Of the pages and their forms.
    """
    return [
        Route("/", _overview),
        Route("/mentors", _search),
        Route("/mentors/{mentor_id:uuid}", _mentor),
        Route("/mentors/{mentor_id:uuid}/handled", _handled, methods=["POST"]),
        Route("/retry", _confirm_retry),
        Route("/retry", _retry, methods=["POST"]),
        Route("/help", _help),
        Mount("/static", _Static(packages=[("worker.coordinator", "static")])),
    ]


class _Static(StaticFiles):
    """
    Files whose address changes with their content, so a browser may keep them.
    """

    @override
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        if b"v=" in scope["query_string"]:
            response.headers["Cache-Control"] = f"max-age={YEAR_SECONDS}, immutable"
        return response


# ------------------------------------------------------------------------------- looking


async def _overview(request: Request) -> Response:
    return await _live(request, view_of(request.query_params))


async def _mentor(request: Request) -> Response:
    return await _live(request, View(kind="mentor", mentor_id=request.path_params["mentor_id"]))


async def _live(request: Request, view: View) -> Response:
    language, views = language_of(request), _views(request)
    try:
        fragment = await views.fragment(view, caller=_caller(request), language=language)
    except NotFoundError:
        raise HTTPException(404) from None
    return await _page(
        request,
        "live.html",
        title=fragment.title,
        fragment=_Safe(fragment.html),
        stream=stream_address(view, language),
        now=fragment.looked_at,
    )


async def _search(request: Request) -> Response:
    words = request.query_params.get("q", "").strip()[:100]
    found: list[mentors.Found] = []
    more = False
    if words:
        async with reading(request.app.state.engine) as connection:
            found, more = await mentors.search(
                connection, words, organization_id=_caller(request).organization_id
            )
    return await _page(
        request,
        "search.html",
        title_key="search.heading_empty",
        words=words,
        found=found,
        more=more,
    )


async def _help(request: Request) -> Response:
    return await _page(request, "help.html", title_key="help.heading")


async def _confirm_retry(request: Request) -> Response:
    """
    Ask before many are tried again.
    """
    require_coordinator()
    everything = "all" in request.query_params
    chosen = _ids(request.query_params.getlist("failure"))
    if everything:
        async with reading(request.app.state.engine) as connection:
            number = await alerts.open_failures(
                connection, organization_id=_caller(request).organization_id
            )
    else:
        number = len(chosen)
    if not number:
        return _back("/", "nothing" if everything else "none_chosen")
    return await _page(
        request,
        "confirm.html",
        title_key="needing.retry",
        number=number,
        everything=everything,
        failures=[] if everything else chosen,
    )


# --------------------------------------------------------------------------------- doing


async def _retry(request: Request) -> Response:
    form = await _form(request)
    chosen = _ids(value for name, value in form if name == "failure")
    actions = request.app.state.actions
    try:
        if ("all", "1") in form:
            said = _counted(await actions.retry_all())
        elif chosen:
            said = _counted(await actions.retry(chosen))
        else:
            said = "none_chosen"
    except UnknownFailureError:
        said = "unknown"
    except NotAllowedError:
        said = "not_allowed"
    return _answer(request, _origin(dict(form).get("from", "/")), said)


async def _handled(request: Request) -> Response:
    form = dict(await _form(request))
    page = f"/mentors/{request.path_params['mentor_id']}"
    try:
        done = await request.app.state.actions.handle(
            UUID(form.get("failure", "")), note=form.get("note", "")
        )
        said = "handled" if done.done else "already_resolved"
    except NoteNeededError:
        said = "note_needed"
    except (UnknownFailureError, ValueError):
        said = "unknown"
    except NotAllowedError:
        said = "not_allowed"
    return _answer(request, page, said)


def _counted(done: Retried) -> str:
    """
    What came of it, as a page is told to say it: "started:3,resolved:1".
    """
    numbers = asdict(done)
    return ",".join(f"{name}:{numbers[name]}" for name in COUNTED if numbers[name]) or "nothing"


def _sentences(said: str, words: Words) -> list[str]:
    """
    What a page is asked to say; what it is not to say is left out.
    """
    sentences = []
    for part in said.split(",")[:10]:
        name, _, number = part.partition(":")
        if name in COUNTED and number.isascii() and number.isdigit():
            sentences.append(words.many(f"outcome.{name}", int(number[:9])))
        elif name in PLAIN:
            sentences.append(words(f"outcome.{name}"))
    return sentences


def _answer(request: Request, page: str, said: str) -> Response:
    if "application/json" not in request.headers.get("accept", ""):
        return _back(page, said)
    words = _views(request).words(language_of(request))
    refused = said in {"unknown", "not_allowed", "none_chosen"}
    return JSONResponse({"sentences": _sentences(said, words)}, status_code=409 if refused else 200)


def _back(page: str, said: str) -> Response:
    mark = "&" if "?" in page else "?"
    return RedirectResponse(f"{page}{mark}{urlencode({'said': said}, safe=':,')}", status_code=303)


async def _form(request: Request) -> list[tuple[str, str]]:
    """
    The fields of a form, as browsers send it.
    """
    return parse_qsl((await request.body()).decode(errors="replace"), max_num_fields=2000)


def _ids(values: Iterable[str]) -> list[UUID]:
    found = []
    for value in values:
        try:
            found.append(UUID(value))
        except ValueError:
            continue
    return found


def _origin(page: str) -> str:
    """
    Where a form was, if that is a page of ours.
    """
    path, _, query = page.partition("?")
    start, _, mentor = path.partition("/mentors/")
    if not start and _ids([mentor]):
        return path
    return view_of(dict(parse_qsl(query))).address


# -------------------------------------------------------------------------------- pages


class _Safe:
    """
    HTML that a template of ours has made.
    """

    def __init__(self, html: str) -> None:
        self._html = html

    def __html__(self) -> str:
        return self._html


def language_of(request: Request) -> Language:
    """
    In which the reader is spoken to.
    """
    return wording.language(
        request.query_params.get("lang"),
        request.cookies.get(LANGUAGE_COOKIE),
        request.headers.get("accept-language"),
    )


def _views(request: Request) -> Views:
    views: Views = request.app.state.views
    return views


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


async def _page(request: Request, template: str, **context: Any) -> Response:  # noqa: ANN401
    """
    A page of somebody who is known, under the name of their organisation.
    """
    name = await _views(request).organization_name(_caller(request).organization_id)
    return _bare_page(request, template, organization=name, **context)


def _bare_page(
    request: Request,
    template: str,
    *,
    organization: str | None = None,
    status: int = 200,
    title: str = "",
    title_key: str = "page.title",
    **context: Any,  # noqa: ANN401 (of the template)
) -> Response:
    language, views = language_of(request), _views(request)
    words = views.words(language)
    other: Language = "en" if language == "nb" else "nb"
    html = views.render(
        template,
        language=language,
        **{"now": wording.now()}
        | {
            "title": title or words(title_key),
            "caller": getattr(request.state, "caller", None),
            "organization": organization,
            "logs_in": request.app.state.logs_in,
            "said": _sentences(request.query_params.get("said", ""), words),
            "other_language": other,
            "other_language_address": "?" + urlencode(_query(request) | {"lang": other}),
            "stream": None,
        }
        | context,
    )
    response = HTMLResponse(html, status_code=status)
    response.headers["Vary"] = "Cookie, Accept-Language"
    if request.query_params.get("lang") in wording.LANGUAGES:
        response.set_cookie(
            LANGUAGE_COOKIE,
            language,
            max_age=YEAR_SECONDS,
            httponly=True,
            samesite="lax",
            secure=request.url.scheme == "https",
        )
    return response


def _query(request: Request) -> dict[str, str]:
    """
    What this page was asked for, to ask for it in another language.
    """
    return {
        name: request.query_params[name] for name in ("q", "shown") if name in request.query_params
    }


PROBLEMS = {
    400: "bad_request",
    403: "forbidden",
    404: "not_found",
    413: "too_large",
    429: "too_many",
    503: "unavailable",
}
"""By status, the keys of `problem`."""


def problem(request: Request, status: int) -> Response:
    """
    A page that says what went wrong, and where to go on.
    """
    words = _views(request).words(language_of(request))
    key = PROBLEMS.get(status, "bad_request" if status < 500 else "error")  # noqa: PLR2004
    return _bare_page(
        request,
        "problem.html",
        status=status,
        title_key="problem.heading",
        sentence=words(f"problem.{key}"),
    )


def login_page(request: Request, key: str, status: int) -> Response:
    """
    A page for whoever is not logged in, or not any more, with the way back in.

    Args:
        key: of what it says.
    """
    words = _views(request).words(language_of(request))
    return _bare_page(
        request,
        "login.html",
        status=status,
        title_key="login.heading",
        sentence=words(f"login.{key}"),
    )
