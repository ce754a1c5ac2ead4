// The conversation outside of the page: kept by the browser if the reader wants it, or as a Markdown file.

import { element } from "./elements.js";

const KEY = "tokensieve.conversation";

const all = (list, test) => Array.isArray(list) && list.every(test);
const isDocument = ({ name, text, note }) => [name, text, note].every((one) => typeof one === "string");
const isPiece = ([kind, text]) => ["content", "reasoning_content"].includes(kind) && typeof text === "string";
const isTurn = ({ text, documents, answer }) =>
  typeof text === "string" && all(documents, isDocument) && all(answer.pieces, isPiece) && Array.isArray(answer.ids);

/** The turns that the browser kept. Anything else that it may have kept is no turn. */
export function kept() {
  try {
    const turns = JSON.parse(localStorage.getItem(KEY));
    return all(turns, isTurn) ? turns : [];
  } catch {
    return []; // no JSON or no such fields, or a private window that stores nothing
  }
}

/** Whether the browser keeps the turns; some megabytes are too much for it. */
export function keep(turns) {
  try {
    localStorage.setItem(KEY, JSON.stringify(turns));
    return true;
  } catch {
    drop(); // or a reload would bring back an older conversation
    return false;
  }
}

export function drop() {
  try {
    localStorage.removeItem(KEY);
  } catch {
    // a private window stores nothing that could be dropped
  }
}

function fenced(text) {
  const longest = Math.max(2, ...(text.match(/`+/g) ?? []).map((run) => run.length));
  const fence = "`".repeat(longest + 1);
  return `${fence}\n${text.replace(/\n$/, "")}\n${fence}`;
}

/** The conversation in Markdown, with its documents. */
export function markdown(turns) {
  const parts = turns.flatMap(({ text, documents, answer }) => [
    "## Question",
    ...documents.flatMap((document) => [`Document: ${document.name}`, fenced(document.text)]),
    text,
    `## Answer of ${answer.model}`,
    answer.content,
    answer.failure.textContent,
  ]);
  return `${parts.filter(Boolean).join("\n\n")}\n`;
}

/** Saves a text as a file of the reader. */
export function download(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "text/markdown" }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000); // the browser may still ask where to
}
