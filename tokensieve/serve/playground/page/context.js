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

  load({ text, starts }, next) {
    this.text = text;
    this.units = unitStarts(text, starts);
    this.next = next;
  }

  token(position) {
    return this.text.slice(this.units[position], this.units[position + 1]);
  }

  /** Marks tokens, and returns how many. */
  show({ values, kinds, ranked }) {
    const marked = ranked.slice(0, MAX_MARKS).sort((a, b) => a - b);
    const most = ranked.length ? values[ranked[0]] : 0;
    const made = document.createDocumentFragment();
    this.nodes = []; // {from: unit, node}, in the text's order
    this.marks = new Map();
    let end = 0;
    const plain = (to) => {
      if (to > end) this.nodes.push({ from: end, node: made.appendChild(new Text(this.text.slice(end, to))) });
    };
    for (const position of marked) {
      plain(this.units[position]);
      const strength = level(values[position], most);
      // a token that is only part of a character has no text of its own
      const className = `a${strength} ${KINDS[kinds[position]]}`;
      const mark = element("mark", { className, tabIndex: -1 }, this.token(position));
      mark.dataset.position = position;
      this.marks.set(position, mark);
      this.nodes.push({ from: this.units[position], node: made.appendChild(mark) });
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
