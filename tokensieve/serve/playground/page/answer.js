// The text of an answer as Markdown. Every token stays an element of its own, so that the reader can choose it.
//
// The parser says which part of the text each element of Markdown is. Nothing is made from HTML: an element is one of
// those named here, and all text is text.

import { copyButton, element } from "./elements.js";
import { GFM, parser } from "./lezer-markdown.js";

// Links are followed only to an address that they name themselves.
const markdown = parser.configure([GFM, { remove: ["LinkReference"] }]);

// The elements, by the parser's names of what they show.
const TAGS = {
  Paragraph: "p",
  Task: "p",
  HTMLBlock: "p",
  CommentBlock: "p",
  ProcessingInstructionBlock: "p",
  ATXHeading1: "h3",
  ATXHeading2: "h4",
  ATXHeading3: "h5",
  ATXHeading4: "h6",
  ATXHeading5: "h6",
  ATXHeading6: "h6",
  SetextHeading1: "h3",
  SetextHeading2: "h4",
  Blockquote: "blockquote",
  BulletList: "ul",
  OrderedList: "ol",
  ListItem: "li",
  FencedCode: "pre",
  CodeBlock: "pre",
  HorizontalRule: "div",
  Table: "table",
  TableHeader: "tr",
  TableRow: "tr",
  TableCell: "td",
  Emphasis: "em",
  StrongEmphasis: "strong",
  Strikethrough: "s",
  InlineCode: "code",
};
// In these, what belongs to no element inside is markup: indents, bars, ends of lines.
const FRAMES = [
  ...["Blockquote", "BulletList", "OrderedList", "ListItem", "FencedCode", "CodeBlock", "HorizontalRule"],
  ...["Table", "TableHeader", "TableRow"],
];
const MARKUP = /Mark$|^(TableDelimiter|CodeInfo|LinkTitle|LinkLabel)$/;
const LINKS = ["Link", "Image", "Autolink", "URL"];
const SAFE = /^(https?:\/\/|mailto:)/i;
const CHOOSABLE = ".source .token, .token:not(.markup *)"; // the tokens that are shown

/** Text that grows at its end. */
export class AnswerText {
  constructor(root) {
    this.root = root;
    this.text = "";
    this.tokens = []; // {at, end}: end in the text
    this.spans = new Map(); // by the part of the text: a token that stays where it is stays the same element
    // Up to `settled.end` of the text nothing changes any more: only the last block can still grow, and a block can
    // only join the one before it while its first line is not complete (--- is a rule, ---x goes on with the text).
    this.settled = { end: 0, nodes: 0, tokens: 0 };
  }

  /** at: number of the answer's tokens before the one that this text belongs to; null if it is unknown. */
  push(text, at) {
    this.text += text;
    this.tokens.push({ at, end: this.text.length });
  }

  /** Shows what was pushed. */
  draw() {
    const { end: base, nodes, tokens } = this.settled;
    while (this.root.childNodes.length > nodes) this.root.lastChild.remove();
    this.base = base;
    this.next = tokens;
    const document = markdown.parse(this.text.slice(base)).topNode;
    let end = 0;
    for (let node = document.firstChild; node; node = node.nextSibling) {
      const line = Math.max(this.text.lastIndexOf("\n", base + node.from - 1) + 1 - base, end);
      this.markup(this.root, end, line);
      const isLineComplete = this.text.indexOf("\n", base + node.from) >= 0;
      if (isLineComplete) this.settled = { end: base + line, nodes: this.root.childNodes.length, tokens: this.next };
      this.markup(this.root, line, node.from);
      this.build(this.root, node);
      end = node.to;
    }
    this.markup(this.root, end, this.text.length - base);
  }

  /** The text is complete: Tab now reaches its first token, and the arrow keys the others from there. */
  finish() {
    this.draw();
    const first = this.root.querySelector(CHOOSABLE);
    if (first) reach(first);
  }

  /** Whether a part of the text is only markup, which is not shown. */
  get isMarkedUp() {
    return [...this.root.querySelectorAll(".markup")].some((one) => one.textContent.trim());
  }

  build(parent, node) {
    if (this.isMarkup(node)) return this.markup(parent, node.from, node.to);
    const address = this.address(node);
    // a link that leads nowhere, or stands in another one, is only text
    if (LINKS.includes(node.name) && (!address || parent.closest("a"))) return this.append(parent, node.from, node.to);
    const tag = tagOf(node);
    const inside = address ? link(address) : tag ? element(tag) : parent;
    if (inside !== parent) parent.append(this.dressed(node, inside));
    let end = node.from;
    for (let child = node.firstChild; child; child = child.nextSibling) {
      this.between(inside, node, end, child.from);
      if (isEmptyCell(child)) inside.append(element("td"));
      this.build(inside, child);
      end = child.to;
    }
    this.between(inside, node, end, node.to);
  }

  /** What belongs to a node, and to none inside of it. */
  between(parent, { name, from: start }, from, to) {
    if (FRAMES.includes(name)) return this.markup(parent, from, to);
    const escape = (name === "Escape" || name === "HardBreak") && from === start ? 1 : 0;
    this.markup(parent, from, from + escape);
    this.append(parent, from + escape, to);
  }

  /** The element with what belongs around it. */
  dressed(node, inside) {
    if (node.name === "HorizontalRule") inside.className = "rule";
    if (node.name === "OrderedList") inside.start = parseInt(this.slice(node.firstChild), 10);
    if (inside.tagName !== "PRE") return inside;
    const info = node.getChild("CodeInfo");
    const code = node.getChildren("CodeText").map((part) => this.slice(part));
    const copy = copyButton("Copy the code", () => code.join(""));
    const block = element("div", { className: "code" }, inside, copy);
    block.dataset.language = info ? this.slice(info) : "";
    return block;
  }

  isMarkup(node) {
    return MARKUP.test(node.name) || (node.name === "URL" && this.isDestination(node));
  }

  /** Whether an address stands in the parentheses of a link, and not in its text. */
  isDestination({ prevSibling: mark }) {
    return mark?.name === "LinkMark" && this.slice(mark) === "(";
  }

  /** Where a link leads, or null if it leads nowhere or has no text. */
  address(node) {
    if (!LINKS.includes(node.name)) return null;
    const url = node.name === "URL" ? node : node.getChildren("URL").at(-1);
    const address = url ? this.slice(url).replace(/^<|>$/g, "") : "";
    const [opening, closing] = node.getChildren("LinkMark");
    const isEmpty = node.name !== "Autolink" && opening && opening.to === closing.from;
    return SAFE.test(address) && !isEmpty ? address : null;
  }

  slice({ from, to }) {
    return this.text.slice(this.base + from, this.base + to);
  }

  markup(parent, from, to) {
    if (to <= from) return;
    const hidden = element("span", { className: "markup" });
    parent.append(hidden);
    this.append(hidden, from, to);
  }

  /** Appends a part of the text, cut at the ends of its tokens. Parts come in the order of the text. */
  append(parent, from, to) {
    let start = this.base + from;
    while (start < this.base + to) {
      while (this.tokens[this.next].end <= start) this.next += 1;
      const { at, end } = this.tokens[this.next];
      const stop = Math.min(end, this.base + to);
      parent.append(this.span(start, stop, at));
      start = stop;
    }
  }

  span(from, to, at) {
    const key = `${from} ${to}`;
    if (!this.spans.has(key)) {
      const span = element("span", at === null ? {} : { className: "token", tabIndex: -1 }, this.text.slice(from, to));
      if (at !== null) span.dataset.at = at;
      this.spans.set(key, span);
    }
    return this.spans.get(key);
  }
}

function tagOf({ name, parent }) {
  return name === "TableCell" && parent.name === "TableHeader" ? "th" : TAGS[name];
}

/** Whether a bar of a table ends a cell without text, of which the parser says nothing. */
function isEmptyCell({ name, parent, prevSibling }) {
  const isBar = name === "TableDelimiter" && parent.name !== "Table";
  return isBar && prevSibling?.name === "TableDelimiter";
}

function link(address) {
  return element("a", { href: address, title: address, target: "_blank", rel: "noopener noreferrer" });
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

/** The token that an arrow key, Home or End leads to, or null. Of one in several parts, the first part with a word. */
export function beside(token, key) {
  const tokens = [...token.closest(".text").querySelectorAll(CHOOSABLE)];
  const numberOf = ({ dataset }) => Number(dataset.at);
  const [numbers, here] = [tokens.map(numberOf), numberOf(token)];
  const next = numbers.find((number) => number > here);
  const last = numbers.findLast((number) => number < here);
  const arrows = { ArrowRight: next, ArrowDown: next, ArrowLeft: last, ArrowUp: last };
  const to = { Home: numbers[0], End: numbers.at(-1), ...arrows }[key];
  const parts = tokens.filter((other) => numberOf(other) === to);
  return parts.find((part) => part.textContent.trim()) ?? parts[0] ?? null;
}
