// The text of an answer. Every token is an element of its own, so that the reader can choose it.

import { element } from "./elements.js";

const FENCE = /^ {0,3}```/;
const CLOSING = /^ {0,3}```\s*$/;

/** Text that grows at its end. Lines between ``` go into a <pre>; the ``` stay, because they are tokens too. */
export class AnswerText {
  constructor(root) {
    this.root = root;
    this.block = root;
    this.line = [];
  }

  /** at: number of the answer's tokens before the one that this text belongs to; null if it is unknown. */
  push(text, at) {
    for (const part of text.match(/[^\n]*\n|[^\n]+/g) ?? []) {
      const token = element("span", at === null ? {} : { className: "token", tabIndex: -1 }, part);
      if (at !== null) token.dataset.at = at;
      this.block.append(token);
      this.line.push(token);
      if (part.endsWith("\n")) this.endLine();
    }
  }

  endLine() {
    const line = this.line.map((token) => token.textContent).join("");
    const outside = this.block === this.root;
    if (outside ? FENCE.test(line) : CLOSING.test(line)) {
      if (outside) this.root.append((this.block = element("pre")));
      this.block.append(element("span", { className: "fence" }, ...this.line));
      if (!outside) this.block = this.root;
    }
    this.line = [];
  }

  /** The text is complete: Tab now reaches its first token, and the arrow keys the others from there. */
  finish() {
    this.endLine();
    const first = this.root.querySelector(".token");
    if (first) reach(first);
  }
}

/** Makes a token the one of its text that Tab reaches. */
export function reach(token) {
  const text = token.closest(".text");
  for (const other of text.querySelectorAll('.token[tabindex="0"]')) {
    other.tabIndex = -1;
    other.removeAttribute("role");
  }
  token.tabIndex = 0;
  token.setAttribute("role", "button");
}

/** The token that an arrow key, Home or End leads to, or null. */
export function beside(token, key) {
  const tokens = [...token.closest(".text").querySelectorAll(".token")];
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[key];
  if (key === "Home") return tokens[0];
  if (key === "End") return tokens.at(-1);
  return (step && tokens[tokens.indexOf(token) + step]) || null;
}
