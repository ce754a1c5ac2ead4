// The whole context as text. There is one text node between two marked tokens, so that a hundred thousand characters
// scroll smoothly.

import { element } from "./elements.js";
import { level } from "./shares.js";

const MAX_MARKS = 6000; // dense attention reads every token; the weakest are left unmarked
const KINDS = ["", "extra", "missed"]; // class names, by the kinds of shares.js

/**
 * The index of each token's first unit in a JavaScript string, where some characters have two units; and the end of the
 * last token.
 */
export function unitStarts(text, starts) {
  const units = new Array(starts.length + 1);
  let token = 0;
  let characters = 0;
  let unit = 0;
  for (const character of text) {
    while (token < starts.length && starts[token] <= characters) units[token++] = unit;
    characters += 1;
    unit += character.length;
  }
  while (token <= starts.length) units[token++] = unit;
  return units;
}

export class ContextText {
  constructor(root) {
    this.root = root;
    this.marks = new Map();
  }

  load({ text, starts, markers }, next) {
    this.text = text;
    this.markers = new Set(markers.slice(0, MAX_MARKS));
    this.units = unitStarts(text, starts);
    this.next = next;
  }

  token(position) {
    return this.text.slice(this.units[position], this.units[position + 1]);
  }

  /** What stands around a token in its line and between markers, at most so many characters a side: {before, after}. */
  around(position, length) {
    let [first, last] = [position, position + 1];
    const [from, to] = [this.units[first], this.units[last]];
    while (first > 0 && !this.markers.has(first - 1) && this.units[first] > from - length) first--;
    while (last < this.units.length - 1 && !this.markers.has(last) && this.units[last] < to + length) last++;
    const before = this.text.slice(this.units[first], from).split("\n");
    const after = this.text.slice(to, this.units[last]).split("\n");
    // what is cut within its line
    const begins = before.length > 1 || first === 0 || this.markers.has(first - 1);
    const ends = after.length > 1 || last === this.units.length - 1 || this.markers.has(last);
    return { before: (begins ? "" : "…") + before.at(-1), after: after[0] + (ends ? "" : "…") };
  }

  /** Marks tokens, and returns how many. The markers of the chat template look like chips, read or not. */
  show({ values, kinds, ranked, coloured }) {
    const marked = ranked.slice(0, MAX_MARKS).sort((a, b) => a - b);
    const most = coloured.length ? values[coloured[0]] : 0;
    const inColour = new Set(coloured);
    const read = new Set(marked);
    const unread = [...this.markers].filter((position) => !read.has(position));
    const made = document.createDocumentFragment();
    this.nodes = []; // {from: unit, node}, in the text's order
    this.marks = new Map();
    let end = 0;
    const plain = (to) => {
      if (to > end) this.nodes.push({ from: end, node: made.appendChild(new Text(this.text.slice(end, to))) });
    };
    for (const position of [...marked, ...unread].sort((a, b) => a - b)) {
      plain(this.units[position]);
      const strength = inColour.has(position) ? `a${level(values[position], most)} ${KINDS[kinds[position]]}` : "aside";
      const className = `${read.has(position) ? strength : ""} ${this.markers.has(position) ? "marker" : ""}`;
      // a token that is only part of a character has no text of its own
      const node = element(read.has(position) ? "mark" : "span", { className }, this.token(position));
      if (read.has(position)) {
        node.tabIndex = -1;
        node.dataset.position = position;
        this.marks.set(position, node);
      }
      this.nodes.push({ from: this.units[position], node: made.appendChild(node) });
      end = this.units[position + 1];
    }
    plain(this.text.length);
    made.append(element("span", { className: "next", title: "the token that was written" }, this.next));
    this.root.replaceChildren(made);
    this.order = marked;
    return marked.length;
  }

  /** The marked token before or after another. */
  beside(position, step) {
    return this.order[this.order.indexOf(position) + step];
  }

  /** Frames a token if it is marked, and no other. */
  point(position) {
    this.root.querySelector(".at")?.classList.remove("at");
    this.marks.get(position)?.classList.add("at");
  }

  /** Scrolls a token to the middle. */
  centre(position) {
    const { top, bottom } = this.rangeAt(this.units[position]).getBoundingClientRect();
    const box = this.root.getBoundingClientRect();
    this.root.scrollTop += (top + bottom) / 2 - (box.top + box.bottom) / 2;
  }

  /** Scrolls a token to the middle, and focuses it if it is marked. */
  reveal(position) {
    this.centre(position);
    this.marks.get(position)?.focus({ preventScroll: true });
  }

  rangeAt(unit) {
    let low = 0;
    let high = this.nodes.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.nodes[middle].from <= unit) low = middle;
      else high = middle - 1;
    }
    const { from, node } = this.nodes[low];
    const range = document.createRange();
    const inside = node instanceof Text ? node : node.firstChild;
    if (inside.length) {
      const at = Math.min(unit - from, inside.length - 1);
      range.setStart(inside, at);
      range.setEnd(inside, at + 1);
    } else range.selectNode(node);
    return range;
  }

  /** The tokens at the upper and the lower edge of the visible part. */
  visible() {
    const { top, bottom } = this.root.getBoundingClientRect();
    const firstBelow = (y) => {
      let low = 0;
      let high = this.units.length - 2;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (this.rangeAt(this.units[middle]).getBoundingClientRect().bottom > y) high = middle;
        else low = middle + 1;
      }
      return low;
    };
    return [firstBelow(top), firstBelow(bottom)];
  }
}
