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
    const written = element("span", { className: "next" }, "token you chose");
    const current = element("span", { className: "outlined" }, "described at the bottom");
    this.key = element("div", { className: "colours", hidden: true }, this.scale, written, current, this.also);
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
    const picks = `This one picks the ${count.format(read)} that seem to matter most, and reads only those.`;
    const lines = [
      ["A model writes one token, a piece of a word, at a time. An ordinary, “dense” model reads all ",
        `${count.format(context)} tokens so far. ${read < context ? picks : "So does this one."}`],
      [colour("heat", "Coloured"), " tokens were read. A stronger colour is more attention. Grey text was not read."],
      [dotted, " tokens are set aside. They get attention whatever is written: the chat's markers, which look like ",
        element("span", { className: "marker" }, "chips"), `, and the last ${this.neighbours} tokens.`],
      [`Each of the ${layers.length} layers picks for itself. The bar at its number shows how much of a dense model's `,
        `attention its choice holds: ${least} to ${most}.`],
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
    this.scale.hidden = this.also.hidden = view === "difference";
    const labels = { markers: "chat markers", neighbours: `last ${this.neighbours} tokens` };
    const listed = new Set(ranked);
    for (const [name, label] of Object.entries(labels)) {
      const sum = apart[name].reduce((all, position) => all + (listed.has(position) ? values[position] : 0), 0);
      this.numbers[name].textContent = `${label}, ${percent(sum)}`;
    }
  }
}
