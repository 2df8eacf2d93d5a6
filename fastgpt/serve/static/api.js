// Requests to the server this page came from. What goes wrong becomes an error whose message can be shown.

const TOKEN = "fastgpt-token"; // its key in this tab's storage
const NO_TOKEN = "This server asks for a token: fill it in above.";
const WRONG_TOKEN = "That is not this server's token: fill in the one that fastgpt serve has printed.";

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status; // of HTTP; 0 where there was no answer
  }
}

export const rememberToken = (token) => sessionStorage.setItem(TOKEN, token);

/** The JSON that the server answers; with a `body` it is a POST. Throws ServerError. */
export async function json(path, body, signal) {
  const answer = await request(path, body, signal);
  try {
    return await answer.json();
  } catch {
    throw lost();
  }
}

/** The events of a streamed completion, one by one. Throws ServerError, or AbortError once `signal` is aborted. */
export async function* events(body, signal) {
  const answer = await request("v1/completions", { ...body, stream: true }, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : lost();
    });
    if (done) throw lost(); // without the [DONE] that ends a completion
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: ?/gm, "");
      if (data === "[DONE]") return;
      if (part.startsWith(":")) continue; // a comment, which keeps a connection open
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(inWords(500, event.error.message), 500);
      yield event;
    }
  }
}

async function request(path, body, signal) {
  const headers = {};
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
  const answer = await fetch(path, options).catch((error) => {
    throw error.name === "AbortError" ? error : lost();
  });
  if (answer.ok) return answer;
  if (answer.status === 401) throw new ServerError(token ? WRONG_TOKEN : NO_TOKEN, 401);
  const said = await answer.json().catch(() => null);
  throw new ServerError(inWords(answer.status, said?.error?.message), answer.status);
}

const lost = () => new ServerError("The connection to the server was lost. Is fastgpt serve still running?", 0);

function inWords(status, message) {
  const kinds = {
    400: "The server does not accept this",
    403: "The server refuses this",
    404: "The server does not have this",
    413: "This is too long for the server",
    422: "The server does not accept this",
    429: "The server is busy",
    503: "The server is busy",
  };
  const kind = kinds[status] ?? "The server failed";
  return message ? `${kind}: ${message}` : `${kind} (HTTP ${status}).`;
}
