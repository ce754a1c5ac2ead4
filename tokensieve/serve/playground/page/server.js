// All requests of the page. Their addresses are relative, so that the page also works below a path of a proxy.

/** Why there is no answer, as a line of text for the reader. */
export class Failure extends Error {}

const REASONS = {
  401: () => "The server requires a key. Reload the page and enter the key as the password, with any name.",
  413: () => "That is more than the server accepts in one request. Remove a document.",
  429: (said) => `The server is busy: ${said}.`,
};

function reason(status, error) {
  const said = (error?.message ?? `the server answered with status ${status}`).replace(/\.$/, "");
  if (error?.code === "context_length_exceeded") return `Too long: ${said}.`;
  return (REASONS[status] ?? ((text) => text[0].toUpperCase() + text.slice(1) + "."))(said);
}

/** The response. Failure unless it is a success; an AbortError of `signal` passes through. */
async function ask(path, options) {
  const response = await guarded(() => fetch(path, options), "The server cannot be reached. Is it running?");
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Failure(reason(response.status, body?.error));
}

async function guarded(work, message) {
  try {
    return await work();
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Failure) throw error;
    throw new Failure(message);
  }
}

const REPORTS = { return_token_ids: true, return_progress: true };

const posted = (body, signal) => ({
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(body),
  signal,
});

/** [{name, limit}]. limit: tokens of a conversation and its answer together. */
export async function models() {
  const { data } = await (await ask("v1/models")).json();
  return data.map(({ id, max_model_len: limit }) => ({ name: id, limit }));
}

export async function tokensOf(text) {
  const headers = { "Content-Type": "text/plain" };
  return (await (await ask("documents", { method: "POST", headers, body: text })).json()).tokens;
}

/** The text of one of the page's own files. */
export async function sourceOf(name) {
  const response = await ask(`page/${name}`);
  return await guarded(() => response.text(), "The connection was lost.");
}

export async function textOfPdf(file) {
  const headers = { "Content-Type": "application/pdf" };
  return await (await ask("documents", { method: "POST", headers, body: file })).json();
}

export async function lens(model, tokenIds, signal) {
  const response = await ask("lens", posted({ model, token_ids: tokenIds }, signal));
  return await guarded(() => response.json(), "The connection was lost.");
}

/** The chunks of an answer, as they come. */
export async function* chat(body, signal) {
  const asked = { ...body, ...REPORTS, stream: true, stream_options: { include_usage: true } };
  const response = await ask("v1/chat/completions", posted(asked, signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await guarded(() => reader.read(), "The connection was lost.");
    if (done) throw new Failure("The answer was cut off.");
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events.filter((text) => text.startsWith("data: "))) {
      if (event === "data: [DONE]") return;
      const chunk = JSON.parse(event.slice("data: ".length));
      if (chunk.error) throw new Failure(reason(chunk.error.code, chunk.error));
      yield chunk;
    }
  }
}
