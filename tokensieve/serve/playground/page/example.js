// A document and a question for a first try: a part of a program, with a note in it that stands nowhere else. The
// program is the one on this page that only changes with its version, so that the small model's answer stays right.

import { sourceOf } from "./server.js";

const NOTE = "// Note: the access code of silver-harbor is 482913.";
const [FIRST, LAST] = [200, 350];

/** {file, text}: the document and the question. */
export async function example() {
  const lines = (await sourceOf("lezer-markdown.js")).split("\n").slice(FIRST, LAST);
  lines.splice(Math.floor(lines.length / 3), 0, NOTE);
  return { file: new File([lines.join("\n")], "example.js"), text: "What is the access code of silver-harbor?" };
}
