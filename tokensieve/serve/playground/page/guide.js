// What the lens's colours, chips and bars mean, and the choice of what is coloured.

import { element } from "./elements.js";
import { choose, chosen } from "./store.js";

const WIDE = 960; // pixels; on a narrower screen the explanation is closed until it is asked for
const count = new Intl.NumberFormat("en");
const percent = (share) => `${(100 * share).toFixed(1)}%`;

export class Guide {
  /** changed: called after the reader has chosen what is coloured. */
  constructor(changed) {
    this.list = element("ul", {});
    this.explained = element("details", { className: "guide", hidden: true });
    this.explained.append(element("summary", {}, "How to read this"), this.list);
    this.explained.addEventListener("toggle", () => choose({ guide: this.explained.open }));
    this.boxes = {};
    this.numbers = {};
    const ramp = [0, 3, 6, 9].map((strength) => element("i", { className: `a${strength}` }));
    this.scale = element("span", { className: "scale" }, "little ", ...ramp, " much attention");
    this.also = element("fieldset", { className: "also" }, element("legend", {}, "Colour too: "));
    for (const name of ["markers", "neighbours"]) {
      const box = (this.boxes[name] = element("input", { type: "checkbox" }));
      box.addEventListener("change", changed);
      this.also.append(element("label", {}, box, (this.numbers[name] = element("span", {}))));
    }
    this.key = element("div", { className: "colours", hidden: true }, this.scale, this.also);
  }

  hide() {
    this.explained.hidden = this.key.hidden = true;
  }

  load({ layers, context }, { neighbours }) {
    this.explained.open = chosen().guide && innerWidth > WIDE;
    this.explained.hidden = this.key.hidden = false;
    this.neighbours = neighbours.length;
    const byKept = [...layers].sort((a, b) => a.kept - b.kept);
    const [least, most] = [byKept[0], byKept.at(-1)].map((one) => `${percent(one.kept)} (layer ${one.layer})`);
    const colour = (name, text) => element("span", { className: `key ${name}` }, text);
    const dotted = element("span", { className: "aside" }, "Dotted");
    const read = Math.max(...layers.map((one) => one.read));
    const some = `this one first picks the ${count.format(read)} that seem to matter most, and reads only those`;
    const here = read < context ? some : "so does this one here";
    const lines = [
      ["A model writes one token, a piece of a word, at a time. For each it looks back at the ",
        `${count.format(context)} tokens so far. An ordinary, “dense” model reads all of them; ${here}. `,
        "The lens shows what it read."],
      [colour("heat", "Coloured"), " tokens were read: the stronger the colour, the more attention they got, that is, ",
        "the more they counted. Grey text was not read at all."],
      [dotted, " tokens were read too, but get attention whatever is written: the chat's markers, which look like ",
        element("span", { className: "marker" }, "chips"), ", and the last tokens."],
      [`The model has ${layers.length} layers, which work one after the other, and each picks for itself. The bar `,
        "at a layer's number shows how good its choice was: which share of dense attention it holds, from ",
        `${least} to ${most}. The rest would have gone to tokens that were not read.`],
      ["Difference: what was ", colour("extra", "read"), " in place of what was ", colour("missed", "missed"), "."],
    ];
    this.list.replaceChildren(...lines.map((line) => element("li", {}, ...line)));
  }

  /** Names of what is left out of the colours. */
  leftOut() {
    return Object.keys(this.boxes).filter((name) => !this.boxes[name].checked);
  }

  /** The attention that both kinds got in this view. The difference has other colours, and leaves nothing out. */
  show({ values, ranked }, apart, view) {
    this.key.hidden = view === "difference";
    const labels = { markers: "chat markers", neighbours: `last ${this.neighbours} tokens` };
    const listed = new Set(ranked);
    for (const [name, label] of Object.entries(labels)) {
      const sum = apart[name].reduce((all, position) => all + (listed.has(position) ? values[position] : 0), 0);
      this.numbers[name].textContent = `${label}, ${percent(sum)}`;
    }
  }
}
