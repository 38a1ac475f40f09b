"""
Why Dataverse would refuse a request, as tables; the first broken rule is the answer.

Sources are pages of Microsoft Learn by their titles. "strict" marks what Dataverse may
let pass and a careful client still never does; "assumed" marks what no page says.
"""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.dynamics.sandbox.call import ACTION_PARAMETERS, Call
from worker.dynamics.sandbox.rows import GUID

if TYPE_CHECKING:
    from collections.abc import Callable

COMPOSE = 'Microsoft Learn: "Compose HTTP requests and handle errors"'
CONDITIONAL = 'Microsoft Learn: "Perform conditional operations using the Web API"'
UPDATE = 'Microsoft Learn: "Update and delete table rows using the Web API"'
ALTERNATE_KEY = 'Microsoft Learn: "Use an alternate key to reference a record"'
ERROR_CODES = 'Microsoft Learn: "Web service error codes"'
CLIENT_ERRORS = 'Microsoft Learn: "Dataverse client errors" (troubleshooting)'
CUSTOM_API = 'Microsoft Learn: "Create and use Custom APIs"'
ACCESS_RIGHTS = 'Microsoft Learn: "Access rights"'
STRICT = "strict: Dataverse may let it pass"
ASSUMED = "assumed: no page says so"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """
    One reason to refuse.

    Args:
        name: what must hold.
        broken: whether the call breaks it; may rely on all rules above.
        status: of the answer.
        code: Dataverse's error code; may be empty, as it often is.
        message: may name the call's `words` in braces.
        source: where the rule is from.
    """

    name: str
    broken: Callable[[Call], bool]
    status: int
    code: str
    message: str
    source: str


def broken_rule(call: Call, rules: tuple[Rule, ...]) -> Rule | None:
    """
    The first rule that a call breaks, or None.
    """
    return next((rule for rule in rules if rule.broken(call)), None)


def _lacks_odata_headers(call: Call) -> bool:
    versions = {call.header("odata-version"), call.header("odata-maxversion")}
    return versions != {"4.0"} or "application/json" not in call.header("accept")


def _is_unknown_segment(call: Call) -> bool:
    return call.table is None and not call.is_batch


def _has_unreadable_key(call: Call) -> bool:
    address = call.address
    return bool(address and address.key is not None and not address.guid and not address.parts)


def _has_undefined_key(call: Call) -> bool:
    columns = [name for name, _ in call.address.parts] if call.address else []
    return bool(columns) and (
        len(columns) > 1 or not call.table or columns[0] not in call.table.keys
    )


def _has_wrong_method(call: Call) -> bool:
    if call.is_action or call.is_batch:
        return call.request.method != "POST"
    addresses_a_row = call.address is not None and call.address.key is not None
    return not (call.request.method == "PATCH" and addresses_a_row)


def _has_wrong_parameters(call: Call) -> bool:
    if not call.is_action:
        return False
    mentor, visible = (call.properties.get(name) for name in ACTION_PARAMETERS)
    is_guid = isinstance(mentor, str) and GUID.fullmatch(mentor) is not None
    return not is_guid or not isinstance(visible, bool)


def _lives_elsewhere(call: Call) -> bool:
    host = urllib.parse.urlsplit(call.request.base_url).hostname
    return bool(call.token and call.token.hosts and host not in call.token.hosts)


AUTHENTICATION_RULES: tuple[Rule, ...] = (
    Rule(
        name="the request carries a bearer token",
        broken=lambda call: call.bearer is None,
        status=401,
        code="",
        message="Authorization has been denied for this request.",
        source=f"{COMPOSE}: 401 RequestIsNotAuthenticated; the text is {ASSUMED}",
    ),
    Rule(
        name="the token is known, not revoked and not expired",
        broken=lambda call: call.token is None or call.token.expires_at <= call.now,
        status=401,
        code="0x8005F101",
        message="The requested resource requires authentication.",
        source=f"{ERROR_CODES}: AccessTokenExpired; {COMPOSE}: 401 ExpiredAuthTicket",
    ),
    Rule(
        name="the token is for this environment",
        broken=lambda call: bool(call.token and call.token.resource != call.request.base_url),
        status=401,
        code="0x8005F101",
        message="The requested resource requires authentication.",
        source=f"{COMPOSE}: 401 BadAuthTicket; the code is {ASSUMED}",
    ),
    Rule(
        name="the application is a user of this environment",
        broken=_lives_elsewhere,
        status=403,
        code="0x80072560",
        message="The user is not a member of the organization.",
        source='Microsoft Learn: "Use single-tenant server-to-server authentication"',
    ),
)

ENVELOPE_RULES: tuple[Rule, ...] = (
    Rule(
        name="the body is not too large",
        broken=lambda call: call.request.oversized,
        status=413,
        code="",
        message="The request is too large.",
        source=f"{COMPOSE}: 413; the bound of 1 MiB is the sandbox's",
    ),
    Rule(
        name="the path points into the Web API",
        broken=lambda call: call.address is None,
        status=404,
        code="",
        message="No HTTP resource was found that matches the request URI.",
        source=f"{COMPOSE}: the path is /api/data/v9.x/; the text is {ASSUMED}",
    ),
    Rule(
        name="OData-Version, OData-MaxVersion and Accept are sent",
        broken=_lacks_odata_headers,
        status=400,
        code="",
        message="OData-Version and OData-MaxVersion must be 4.0, Accept application/json.",
        source=f"{COMPOSE}: every request should have them; {STRICT}",
    ),
)

OPERATION_RULES: tuple[Rule, ...] = (
    Rule(
        name="the segment is an entity set or an action",
        broken=_is_unknown_segment,
        status=404,
        code="0x8006088a",
        message="Resource not found for the segment '{segment}'.",
        source='Microsoft Learn: "Custom API table columns" (troubles with a name)',
    ),
    Rule(
        name="no data is read",
        broken=lambda call: call.is_read,
        status=403,
        code="0x80040220",
        message="Principal user (Id={client_id}) is missing prvRead{Table} privilege.",
        source=f"{CLIENT_ERRORS}; {ACCESS_RIGHTS}: Retrieve needs READ, which the role lacks;"
        f" {COMPOSE}: return=representation answers with data",
    ),
    Rule(
        name="the key can be read",
        broken=_has_unreadable_key,
        status=400,
        code="0x80060888",
        message="Bad Request - Error in query syntax.",
        source=f"{ALTERNATE_KEY}: the forms of a key; the code is {ASSUMED}",
    ),
    Rule(
        name="the alternate key is defined",
        broken=_has_undefined_key,
        status=400,
        code="0x80060890",
        message="The key in the request URI is not valid for resource"
        " 'Microsoft.Dynamics.CRM.{table}'.",
        source=f"{ALTERNATE_KEY}; {ERROR_CODES}: EntityKeyNotDefined",
    ),
    Rule(
        name="the method fits the resource",
        broken=_has_wrong_method,
        status=405,
        code="",
        message="The requested resource does not support http method '{method}'.",
        source=f"{COMPOSE}: 405; that only PATCH of a row and POST of an action are served is"
        " the sandbox's choice",
    ),
    Rule(
        name="the body is declared as JSON",
        broken=lambda call: call.header("content-type").partition(";")[0] != "application/json",
        status=415,
        code="",
        message="The request entity's media type is not supported for this resource.",
        source=f"{COMPOSE}: Content-Type is required with a JSON body; the status is {ASSUMED}",
    ),
    Rule(
        name="the body is a JSON object",
        broken=lambda call: not isinstance(call.body, dict),
        status=400,
        code="0x80048d19",
        message="Error identified in Payload provided by the user for Entity :'{segment}'.",
        source=f"{COMPOSE}: 400; the code is {ASSUMED}, from answers seen in the field",
    ),
    Rule(
        name="the columns exist",
        broken=lambda call: call.is_write and bool(call.strangers),
        status=400,
        code="0x80048d19",
        message="Error identified in Payload provided by the user for Entity :'{segment}'."
        " The property '{strangers}' does not exist on type 'Microsoft.Dynamics.CRM.{table}'.",
        source=f"{COMPOSE}: 400; the code is {ASSUMED}, from answers seen in the field",
    ),
    Rule(
        name="the values have the columns' types",
        broken=lambda call: call.is_write and bool(call.misfits),
        status=400,
        code="0x80048d19",
        message="Error identified in Payload provided by the user for Entity :'{segment}'."
        " Cannot convert the literal of '{misfits}' to the expected type.",
        source=f"{COMPOSE}: 400; the code is {ASSUMED}, from answers seen in the field",
    ),
    Rule(
        name="the action knows the parameters",
        broken=lambda call: call.is_action and bool(call.strangers),
        status=400,
        code="0x80048d19",
        message="The parameter '{strangers}' in the request payload is not a valid parameter for"
        " the operation '{segment}'.",
        source=f"{CUSTOM_API}: request parameters; the code is {ASSUMED}",
    ),
    Rule(
        name="the action gets a GUID and a Boolean",
        broken=_has_wrong_parameters,
        status=400,
        code="0x80048d19",
        message="MentorId (Edm.Guid) and Visible (Edm.Boolean) are required by '{segment}'.",
        source=f"{CUSTOM_API}: required request parameters; the code is {ASSUMED}",
    ),
    Rule(
        name="the role may execute the action",
        broken=lambda call: call.is_action and not call.settings.privileges.execute,
        status=403,
        code="0x80040220",
        message="Principal user (Id={client_id}) is missing the privilege of '{segment}'.",
        source=f"{CUSTOM_API}: ExecutePrivilegeName; {CLIENT_ERRORS}",
    ),
    Rule(
        name="the role may write",
        broken=lambda call: call.is_write and not call.settings.privileges.write,
        status=403,
        code="0x80040220",
        message="Principal user (Id={client_id}) is missing prvWrite{Table} privilege.",
        source=f"{CLIENT_ERRORS}; {ACCESS_RIGHTS}: Update needs WRITE",
    ),
    Rule(
        name="If-None-Match: * finds no row",
        broken=lambda call: call.header("if-none-match") == "*" and call.row is not None,
        status=412,
        code="",
        message="A record with matching key values already exists.",
        source=f"{CONDITIONAL}: prevent update in upsert",
    ),
    Rule(
        name="If-Match is *",
        broken=lambda call: call.header("if-match") not in {"", "*"},
        status=412,
        code="0x80060882",
        message="The version of the existing record doesn't match the RowVersion provided.",
        source=f"{CONDITIONAL}; {ERROR_CODES}: ConcurrencyVersionMismatch. An ETag cannot be"
        " had without reading, so none can match",
    ),
    Rule(
        name="If-Match: * finds the row by its GUID",
        broken=lambda call: call.update_only and call.row is None and bool(_guid(call)),
        status=404,
        code="0x80040217",
        message="{table} With Id = {key} Does Not Exist",
        source=f"{CONDITIONAL}: prevent create in upsert; {CLIENT_ERRORS}: the code",
    ),
    Rule(
        name="If-Match: * finds the row by its alternate key",
        broken=lambda call: call.update_only and call.row is None and not call.is_action,
        status=404,
        code="0x80060891",
        message="A record with the specified key values does not exist in {table} entity",
        source=f"{CONDITIONAL}: prevent create in upsert; {ERROR_CODES}: RecordNotFoundByEntityKey",
    ),
    Rule(
        name="the action finds the row",
        broken=lambda call: call.is_action and call.row is None,
        status=404,
        code="0x80040217",
        message="{table} With Id = {key} Does Not Exist",
        source=f"{CLIENT_ERRORS}: the code; that the plug-in lets it through is {ASSUMED}",
    ),
    Rule(
        name="the role may create",
        broken=lambda call: call.row is None and not call.settings.privileges.create,
        status=403,
        code="0x80040220",
        message="Principal user (Id={client_id}) is missing prvCreate{Table} privilege.",
        source=f"{UPDATE}: PATCH without If-Match is an upsert; {CLIENT_ERRORS}",
    ),
)

REQUEST_RULES = AUTHENTICATION_RULES + ENVELOPE_RULES


def _guid(call: Call) -> str | None:
    return call.address.guid if call.address else None
