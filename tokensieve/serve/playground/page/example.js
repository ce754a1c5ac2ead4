// A document and a question for a first try: a part of this page, with a note in it that stands nowhere else.

import { sourceOf } from "./server.js";

const NOTE = "// Note: the access code of silver-harbor is 482913.";
const LINES = 150;

/** {file, text}: the document and the question. */
export async function example() {
  const lines = (await sourceOf("chat.js")).split("\n").slice(0, LINES);
  lines.splice(Math.floor(lines.length / 3), 0, NOTE);
  return { file: new File([lines.join("\n")], "example.js"), text: "What is the access code of silver-harbor?" };
}
