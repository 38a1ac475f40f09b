/**
 * The function's settings: all from its environment, where Supabase puts its secrets.
 */

/** Reads a variable of the environment. */
export type Environment = (name: string) => string | undefined;

/** Where in Dynamics the visibility is written; the same fields as the worker's. */
export interface Target {
  readonly url: string;
  readonly entity_set: string;
  readonly key: string;
  readonly column: string;
  readonly operation: "patch" | "action";
  readonly action: string;
}

/** All that the function needs to know. */
export interface Settings {
  readonly organization: string;
  readonly target: Target;
  readonly authority: string;
  readonly tenant: string;
  readonly client: string;
  /** Read anew for each token request. */
  readonly secret: () => string;
}

const GUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;
const TENANT = /^[A-Za-z0-9][A-Za-z0-9.-]{0,252}$/;
const IDENTIFIER = /^[A-Za-z_][A-Za-z0-9_]{0,127}$/;

/** Whether a text is a GUID in its usual form. */
export function isGuid(text: string): boolean {
  return GUID.test(text);
}

/** The keys that open the function: the one in use and, while it is being changed, the last. */
export function keysOf(environment: Environment): string[] {
  return [environment("HLF_EDGE_KEY"), environment("HLF_EDGE_KEY_PREVIOUS")]
    .filter((key) => key !== undefined && key !== "") as string[];
}

/** The settings, or the names of the variables that are missing or wrong. */
export function settingsOf(environment: Environment): Settings | readonly string[] {
  const wrong: string[] = [];
  const read = (name: string, fallback: string, fits: (text: string) => boolean): string => {
    const text = environment(name) || fallback;
    if (!fits(text)) wrong.push(name);
    return text;
  };
  const isName = (text: string) => IDENTIFIER.test(text);
  const isNameOrNone = (text: string) => text === "" || IDENTIFIER.test(text);
  const operation = read(
    "HLF_DYNAMICS_OPERATION",
    "patch",
    (text) => text === "patch" || text === "action",
  ) as Target["operation"];
  const settings: Settings = {
    organization: read("HLF_ORGANIZATION_ID", "", isGuid).toLowerCase(),
    target: {
      url: origin(read("HLF_DYNAMICS_URL", "", isAddress)),
      entity_set: read("HLF_DYNAMICS_ENTITY_SET", "contacts", isName),
      key: read("HLF_DYNAMICS_KEY", "", isNameOrNone),
      column: read("HLF_DYNAMICS_COLUMN", "hlf_portalvisible", isName),
      operation,
      action: read("HLF_DYNAMICS_ACTION", "", operation === "action" ? isName : isNameOrNone),
    },
    authority: origin(
      read("HLF_DYNAMICS_AUTHORITY", "https://login.microsoftonline.com", isAddress),
    ),
    tenant: read("HLF_DYNAMICS_TENANT_ID", "", (text) => TENANT.test(text)),
    client: read("HLF_DYNAMICS_CLIENT_ID", "", (text) => text !== ""),
    secret: () => environment("HLF_DYNAMICS_CLIENT_SECRET") ?? "",
  };
  if (settings.secret() === "") wrong.push("HLF_DYNAMICS_CLIENT_SECRET");
  return wrong.length > 0 ? wrong : settings;
}

/** Whether two targets are the same, however their addresses are spelt. */
export function isSameTarget(one: Target, other: Target): boolean {
  return (
    isAddress(other.url) &&
    origin(one.url) === origin(other.url) &&
    one.entity_set === other.entity_set &&
    one.key === other.key &&
    one.column === other.column &&
    one.operation === other.operation &&
    one.action === other.action
  );
}

/**
 * Whether a secret may be sent to this address: scheme, host and port alone; plain http for
 * this machine only, where a pretend Dynamics may run.
 */
export function isAddress(text: string): boolean {
  if (!URL.canParse(text)) return false;
  const url = new URL(text);
  const bare = url.pathname === "/" && !url.search && !url.hash && !url.username && !url.password;
  return bare && (url.protocol === "https:" || (url.protocol === "http:" && isLoopback(url)));
}

function isLoopback(url: URL): boolean {
  return url.hostname === "localhost" || url.hostname === "[::1]" ||
    /^127\.\d+\.\d+\.\d+$/.test(url.hostname);
}

function origin(address: string): string {
  return URL.canParse(address) ? new URL(address).origin : "";
}
