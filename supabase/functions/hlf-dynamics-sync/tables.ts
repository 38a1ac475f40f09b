/**
 * What answers mean, in tables. Made from the worker's `errors.py`, `edge_errors.py`; never edited:
 *
 *     python -m tests.integration.edge_tables
 */

/** What a failure is to the worker. */
export interface Meaning {
  readonly kind: "transient" | "throttled" | "permanent" | "configuration";
  /** Stable; machines and support rely on it. */
  readonly code: string;
  /** One sentence for people, without its full stop. */
  readonly says: string;
  /** The request may yet take effect. */
  readonly doubtful: boolean;
}

export const MEANINGS = {
  APPLICATION_REFUSED: {
    kind: "configuration",
    code: "token_refused",
    says: "Entra ID does not let this application ask for tokens; check tenant and client id",
    doubtful: false,
  },
  BAD_GATEWAY: {
    kind: "transient",
    code: "bad_gateway",
    says: "A gateway before Dynamics got no proper answer from it",
    doubtful: true,
  },
  BAD_REQUEST: {
    kind: "permanent",
    code: "bad_request",
    says: "Dynamics refused the request for this record",
    doubtful: false,
  },
  CERTIFICATE: {
    kind: "configuration",
    code: "certificate",
    says: "The server's certificate is not trusted, has expired or is for another name",
    doubtful: false,
  },
  CLIENT_REFUSED: {
    kind: "configuration",
    code: "token_refused",
    says: "Entra ID refused the client id or its secret; the secret may have expired",
    doubtful: false,
  },
  CONNECTION_LOST: {
    kind: "transient",
    code: "connection_lost",
    says: "The connection to Dynamics broke",
    doubtful: false,
  },
  DUPLICATE: {
    kind: "permanent",
    code: "duplicate",
    says: "Dynamics refused the change because of a duplicate record",
    doubtful: false,
  },
  FORBIDDEN: {
    kind: "configuration",
    code: "forbidden",
    says: "The application lacks a permission in Dynamics; check its security role",
    doubtful: false,
  },
  INCOMPLETE_ANSWER: {
    kind: "transient",
    code: "incomplete_answer",
    says: "The answer of Dynamics is missing, cut short or no HTTP",
    doubtful: false,
  },
  INVALID_ADDRESS: {
    kind: "configuration",
    code: "invalid_address",
    says: "The request cannot be sent as it is set up; check the addresses in the settings",
    doubtful: false,
  },
  INVALID_VALUE: {
    kind: "permanent",
    code: "invalid_value",
    says: "Dynamics does not accept the value for this record",
    doubtful: false,
  },
  KEY_NOT_DEFINED: {
    kind: "configuration",
    code: "key_not_defined",
    says: "The alternate key is not defined on the table in Dynamics",
    doubtful: false,
  },
  METHOD_NOT_ALLOWED: {
    kind: "configuration",
    code: "method_not_allowed",
    says: "This address does not take such a request; check the operation and its target",
    doubtful: false,
  },
  NOT_A_USER: {
    kind: "configuration",
    code: "not_a_user",
    says: "The application is no application user of this Dynamics environment",
    doubtful: false,
  },
  NOT_SET_UP: {
    kind: "configuration",
    code: "edge_not_set_up",
    says: "Settings of the Edge Function are missing or wrong",
    doubtful: false,
  },
  OTHER_HOST: {
    kind: "configuration",
    code: "other_host",
    says: "The token was not sent, because the request goes to another host than it is for",
    doubtful: false,
  },
  OTHER_ORGANIZATION: {
    kind: "configuration",
    code: "edge_other_organization",
    says: "The Edge Function serves another organisation; check HLF_ORGANIZATION_ID, HLF_EDGE_URL",
    doubtful: false,
  },
  OTHER_TARGET: {
    kind: "configuration",
    code: "edge_other_target",
    says: "The Edge Function has another target than we; compare HLF_DYNAMICS_* on both sides",
    doubtful: false,
  },
  PAYLOAD_REFUSED: {
    kind: "configuration",
    code: "payload_refused",
    says: "Dynamics does not know the column, or it is not a yes/no column",
    doubtful: false,
  },
  RECORD_ACCESS_DENIED: {
    kind: "permanent",
    code: "record_access_denied",
    says: "The application may not write this mentor's record in Dynamics; check who owns it",
    doubtful: false,
  },
  RECORD_NOT_FOUND: {
    kind: "permanent",
    code: "record_not_found",
    says: "Dynamics has no record of this mentor; check the id that links the two",
    doubtful: false,
  },
  REDIRECT_REFUSED: {
    kind: "configuration",
    code: "redirect_refused",
    says: "The server sent us elsewhere, which is never followed; check the address",
    doubtful: false,
  },
  SCOPE_REFUSED: {
    kind: "configuration",
    code: "token_refused",
    says: "Entra ID gives no token for this Dynamics URL; check the URL and the tenant",
    doubtful: false,
  },
  SECRET_UNREADABLE: {
    kind: "configuration",
    code: "secret_unreadable",
    says: "The client secret could not be read",
    doubtful: false,
  },
  SERVER_ERROR: {
    kind: "transient",
    code: "server_error",
    says: "Dynamics failed while handling the request",
    doubtful: false,
  },
  SERVER_TIMEOUT: {
    kind: "transient",
    code: "server_timeout",
    says: "Dynamics or a gateway before it gave up waiting",
    doubtful: true,
  },
  THROTTLED: {
    kind: "throttled",
    code: "throttled",
    says: "Dynamics asks everybody to wait before sending more",
    doubtful: false,
  },
  TIMEOUT: {
    kind: "transient",
    code: "timeout",
    says: "Dynamics did not answer in time",
    doubtful: false,
  },
  TOKEN_REFUSED: {
    kind: "configuration",
    code: "token_refused",
    says: "Entra ID refused the token request; check tenant, client id and secret",
    doubtful: false,
  },
  TOKEN_THROTTLED: {
    kind: "throttled",
    code: "token_throttled",
    says: "Entra ID asks for fewer token requests",
    doubtful: false,
  },
  TOKEN_UNAVAILABLE: {
    kind: "transient",
    code: "token_unavailable",
    says: "No token could be fetched from Entra ID at the moment",
    doubtful: false,
  },
  TOKEN_UNUSABLE: {
    kind: "transient",
    code: "token_unusable",
    says: "Entra ID answered without a token that can be used",
    doubtful: false,
  },
  UNAUTHORIZED: {
    kind: "configuration",
    code: "unauthorized",
    says: "Dynamics does not accept the token, not even a new one",
    doubtful: false,
  },
  UNAVAILABLE: {
    kind: "transient",
    code: "unavailable",
    says: "Dynamics is not available at the moment",
    doubtful: false,
  },
  UNEXPECTED_ANSWER: {
    kind: "transient",
    code: "unexpected_answer",
    says: "The answer is not the one that Dynamics gives to this request",
    doubtful: true,
  },
  UNREACHABLE: {
    kind: "transient",
    code: "unreachable",
    says: "No connection to Dynamics could be made",
    doubtful: false,
  },
  VERSION_MISMATCH: {
    kind: "permanent",
    code: "precondition_failed",
    says: "A condition of the request is not met in Dynamics",
    doubtful: false,
  },
  WRONG_ADDRESS: {
    kind: "configuration",
    code: "wrong_address",
    says: "There is nothing at this address; check the Dynamics URL, entity set and action",
    doubtful: false,
  },
} as const satisfies Record<string, Meaning>;

/** An error code of Dataverse, as an unsigned number of 32 bits. */
export const BY_CODE: ReadonlyMap<number, Meaning> = new Map<number, Meaning>([
  [0x80072321, MEANINGS.THROTTLED],
  [0x80072322, MEANINGS.THROTTLED],
  [0x80072326, MEANINGS.THROTTLED],
  [0x8005f103, MEANINGS.THROTTLED],
  [0x8004a001, MEANINGS.UNAVAILABLE],
  [0x80073000, MEANINGS.UNAVAILABLE],
  [0x80044151, MEANINGS.SERVER_ERROR],
  [0x80044150, MEANINGS.SERVER_ERROR],
  [0x80040255, MEANINGS.SERVER_ERROR],
  [0x80040216, MEANINGS.SERVER_ERROR],
  [0x80040217, MEANINGS.RECORD_NOT_FOUND],
  [0x80060891, MEANINGS.RECORD_NOT_FOUND],
  [0x80048306, MEANINGS.RECORD_ACCESS_DENIED],
  [0x80040237, MEANINGS.DUPLICATE],
  [0x80040333, MEANINGS.DUPLICATE],
  [0x80060892, MEANINGS.DUPLICATE],
  [0x80060882, MEANINGS.VERSION_MISMATCH],
  [0x80044331, MEANINGS.INVALID_VALUE],
  [0x80040220, MEANINGS.FORBIDDEN],
  [0x80040299, MEANINGS.FORBIDDEN],
  [0x80040256, MEANINGS.FORBIDDEN],
  [0x80048405, MEANINGS.FORBIDDEN],
  [0x80072561, MEANINGS.FORBIDDEN],
  [0x80072559, MEANINGS.FORBIDDEN],
  [0x80072560, MEANINGS.NOT_A_USER],
  [0x8005f101, MEANINGS.UNAUTHORIZED],
  [0x8006088a, MEANINGS.WRONG_ADDRESS],
  [0x80060890, MEANINGS.KEY_NOT_DEFINED],
  [0x80048d19, MEANINGS.PAYLOAD_REFUSED],
]);

/** An HTTP status of Dynamics, for answers without a known error code. */
export const BY_STATUS: ReadonlyMap<number, Meaning> = new Map<number, Meaning>([
  [400, MEANINGS.BAD_REQUEST],
  [401, MEANINGS.UNAUTHORIZED],
  [403, MEANINGS.FORBIDDEN],
  [405, MEANINGS.METHOD_NOT_ALLOWED],
  [408, MEANINGS.SERVER_TIMEOUT],
  [411, MEANINGS.METHOD_NOT_ALLOWED],
  [412, MEANINGS.VERSION_MISMATCH],
  [429, MEANINGS.THROTTLED],
  [500, MEANINGS.SERVER_ERROR],
  [502, MEANINGS.BAD_GATEWAY],
  [503, MEANINGS.UNAVAILABLE],
  [504, MEANINGS.SERVER_TIMEOUT],
]);

/** An `error` word of the token endpoint. */
export const BY_WORD: ReadonlyMap<string, Meaning> = new Map<string, Meaning>([
  ["invalid_client", MEANINGS.CLIENT_REFUSED],
  ["unauthorized_client", MEANINGS.APPLICATION_REFUSED],
  ["invalid_scope", MEANINGS.SCOPE_REFUSED],
  ["invalid_resource", MEANINGS.SCOPE_REFUSED],
  ["invalid_request", MEANINGS.TOKEN_REFUSED],
  ["invalid_grant", MEANINGS.TOKEN_REFUSED],
  ["unsupported_grant_type", MEANINGS.TOKEN_REFUSED],
  ["access_denied", MEANINGS.TOKEN_REFUSED],
  ["temporarily_unavailable", MEANINGS.TOKEN_UNAVAILABLE],
  ["server_error", MEANINGS.TOKEN_UNAVAILABLE],
]);

/** Statuses after which a request may yet take effect, whatever they mean. */
export const IN_DOUBT: ReadonlySet<number> = new Set([408, 502, 504]);
