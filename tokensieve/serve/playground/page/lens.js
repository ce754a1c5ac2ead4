// The lens: marks on the context what the model read when it wrote a token.

import { ContextText } from "./context.js";
import { element } from "./elements.js";
import { Guide } from "./guide.js";
import { Failure, lens } from "./server.js";
import { ONLY_DENSE, everyday, sharesAt, sharesOf } from "./shares.js";
import { Strip } from "./strip.js";

const VIEWS = { read: "Read", dense: "Dense would read", difference: "Difference" };
const AROUND = 28; // characters of the text around the strongest token
const count = new Intl.NumberFormat("en");
const percent = (share) => `${(100 * share).toFixed(1)}%`;
const exact = (share) => `${Number((100 * share).toPrecision(3))}%`;
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
const tokens = (number) => `${count.format(number)} ${number === 1 ? "token" : "tokens"}`;
const quoted = (text) => `“${visible(text)}”`;

/** Radio buttons in a row; arrow keys move between them. */
function choice(name, legend, options, change) {
  const made = options.map(([value, label, { title = "", bar = "" } = {}], i) => {
    const input = element("input", { type: "radio", name, value, checked: i === 0 });
    if (title) input.ariaLabel = `${legend} ${label}, ${title}`;
    input.addEventListener("change", () => change(value));
    return element("label", { title }, input, element("span", {}, label, bar));
  });
  return element("fieldset", { className: "choice" }, element("legend", {}, legend), ...made);
}

export class Lens {
  /** panel: an empty element. closed: called when the reader closes it. */
  constructor(panel, closed) {
    Object.assign(this, { panel, closed, asking: null });
    this.title = element("h2", {});
    this.close_ = element("button", { type: "button", className: "quiet", ariaLabel: "Close the lens" }, "Close");
    this.close_.addEventListener("click", () => this.close());
    this.lead = element("p", { className: "lead" });
    this.summary = element("p", { className: "summary", role: "status" });
    this.guide = new Guide(() => this.show({}));
    this.choices = element("div", { className: "choices" });
    const far = element("span", {}, ", from start to end"); // left out on a phone
    const caption = ["The whole conversation", far, "; the grey part is shown below"];
    this.caption = element("p", { className: "caption", hidden: true }, ...caption);
    this.canvas = element("canvas", { className: "strip", ariaHidden: "true" });
    const label = "The context that was read";
    this.body = element("div", { className: "context", tabIndex: 0, role: "region", ariaLabel: label });
    this.detail = element("p", { className: "detail", role: "status" });
    this.stronger = element("button", { type: "button", className: "quiet" }, "Next stronger");
    this.weaker = element("button", { type: "button", className: "quiet" }, "Next weaker");
    this.strongest = element("button", { type: "button", className: "quiet" }, "Go to strongest");
    const steps = element("div", { className: "steps" }, this.strongest, this.stronger, this.weaker);
    const foot = element("footer", {}, this.detail, steps);
    const head = element("header", {}, this.title, element("span", { className: "space" }), this.close_);
    const { explained, key } = this.guide;
    const above = [head, this.lead, this.summary, explained, this.choices, key, this.caption, this.canvas];
    panel.append(...above, this.body, foot);
    this.text = new ContextText(this.body);
    this.strip = new Strip(this.canvas, (position) => this.text.reveal(position));
    this.strongest.addEventListener("click", () => this.step(-Infinity));
    this.stronger.addEventListener("click", () => this.step(-1));
    this.weaker.addEventListener("click", () => this.step(1));
    const onMark = (act) => ({ target }) => target.matches("mark") && act(Number(target.dataset.position));
    this.body.addEventListener("pointerover", onMark((position) => this.tell(position)));
    this.body.addEventListener("pointerleave", () => this.tell(this.at));
    this.body.addEventListener("focusin", onMark((position) => this.settle(position)));
    this.body.addEventListener("keydown", (event) => this.walk(event));
    this.body.addEventListener("scroll", () => requestAnimationFrame(() => this.draw()));
    new ResizeObserver(() => this.resized()).observe(this.body);
  }

  get isOpen() {
    return !this.panel.hidden;
  }

  /** model: its id. ids: prompt and answer up to the token. token: its text. */
  async open({ model, ids, token }) {
    this.asking?.abort();
    const asking = (this.asking = new AbortController());
    this.panel.hidden = false;
    this.panel.classList.add("waiting");
    this.panel.ariaBusy = "true";
    this.data = null;
    this.title.replaceChildren("What was read for ", element("q", {}, token.replaceAll("\n", "↵")));
    this.summary.textContent = `Reading ${count.format(ids.length)} tokens again…`;
    this.detail.textContent = "";
    this.lead.textContent = "";
    this.guide.hide();
    this.caption.hidden = true;
    this.choices.replaceChildren();
    this.body.replaceChildren();
    this.close_.focus();
    try {
      const data = await lens(model, ids, asking.signal);
      this.load(data, token);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.summary.textContent = error instanceof Failure ? error.message : "The server's answer cannot be shown.";
      if (!(error instanceof Failure)) throw error;
    } finally {
      if (this.asking === asking) {
        this.panel.classList.remove("waiting");
        this.panel.ariaBusy = "false";
      }
    }
  }

  close() {
    this.asking?.abort();
    this.data = null;
    this.panel.hidden = true;
    this.closed();
  }

  load(data, token) {
    Object.assign(this, { data, view: "read", layer: null, at: null, apart: everyday(data) });
    this.text.load(data, token);
    this.strip.load(data.context);
    const bar = (kept) => {
      const share = percent(kept);
      const filled = element("i", {});
      filled.style.height = share;
      return { title: `holds ${share} of dense attention`, bar: element("span", { className: "kept" }, filled) };
    };
    const layers = data.layers.map((one, i) => [i, `${one.layer}`, bar(one.kept)]);
    this.guide.load(data, this.apart);
    this.caption.hidden = false;
    this.choices.append(
      choice("view", "Show", Object.entries(VIEWS), (view) => this.show({ view })),
      choice("layer", "Layer", [[null, "All"], ...layers], (layer) => this.show({ layer })),
    );
    this.show({});
    this.text.reveal(this.shares.coloured[0]);
    this.draw();
  }

  show(changes) {
    Object.assign(this, changes);
    this.canvas.classList.toggle("difference", this.view === "difference");
    const leftOut = this.view === "difference" ? [] : this.guide.leftOut(); // both kinds of attention have them
    const aside = new Set(leftOut.flatMap((name) => this.apart[name]));
    this.shares = sharesOf(this.data, this.layer, this.view, aside);
    this.guide.show(this.shares, this.apart, this.view);
    this.lead.replaceChildren(...this.leading());
    const { scrollTop } = this.body;
    const marked = this.text.show(this.shares);
    this.body.scrollTop = scrollTop;
    const rest = this.shares.ranked.length - marked;
    this.summary.replaceChildren(...this.sentences(), rest ? ` The ${count.format(rest)} weakest are not marked.` : "");
    for (const button of [this.strongest, this.stronger, this.weaker]) button.disabled = !marked;
    this.settle(this.at);
    this.draw();
  }

  /** Where most of the attention went, in a sentence of texts and elements. */
  leading() {
    const { values, ranked, coloured } = this.shares;
    if (this.view === "difference" || !coloured.length) return [];
    const position = coloured[0];
    const { before, after } = this.text.around(position, AROUND);
    const place = element("span", { className: "place" }, visible(before));
    place.append(element("b", {}, visible(this.text.token(position))), visible(after));
    const one = this.layer === null ? "the model" : `layer ${this.data.layers[this.layer].layer}`;
    const looked = this.view === "dense" ? `dense attention would make ${one} look` : `${one} looked`;
    const far = `${tokens(this.data.context - position)} back`;
    const got = `${this.view === "dense" ? "would get" : "got"} ${exact(values[position])} of the attention`;
    const meaning = "Attention is how much each token counts; it adds up to 100%.";
    const apart = coloured.length < ranked.length ? " Dotted tokens are set aside." : "";
    const end = ` ${far}, which ${got}. ${meaning}${apart}`;
    return [`To write ${quoted(this.text.next)}, ${looked} most at `, place, end];
  }

  /** The view in a sentence or two, as texts and elements. */
  sentences() {
    const { context, layers } = this.data;
    const { ranked, kinds } = this.shares;
    const one = this.layer === null ? null : layers[this.layer];
    const who = one ? `Layer ${one.layer}` : "Each layer";
    const read = one ? one.read : Math.max(...layers.map((layer) => layer.read));
    if (this.view === "difference") {
      const missed = ranked.filter((position) => kinds[position] === ONLY_DENSE).length;
      const would = "get most attention if everything were read.";
      if (!ranked.length) return [`${who} read exactly the tokens that would ${would}`];
      const key = (kind, number) => element("span", { className: `key ${kind}` }, tokens(number));
      const all = one ? who : `The ${layers.length} layers`;
      const [extra, other] = [key("extra", ranked.length - missed), key("missed", missed)];
      return [`${all} read `, extra, " in place of ", other, ` that would ${would}`];
    }
    if (read >= context) return [`${who} read all ${tokens(context)}.`];
    const of = `${count.format(read)} of ${tokens(context)}`;
    const together = (verb) => (one ? "" : `; ${count.format(ranked.length)} ${verb} at least one layer`);
    if (this.view === "dense") {
      const where = one ? `layer ${one.layer}` : "each layer";
      const would = `would get most attention in ${where} if everything were read`;
      return [`The ${of} that ${would}${together("are among them in")}.`];
    }
    const kept = one ? one.kept : layers.reduce((sum, layer) => sum + layer.kept, 0) / layers.length;
    const these = one ? "They" : `On average, a layer's ${count.format(read)}`;
    const hold = `would hold ${percent(kept)} of the attention of a model that reads everything`;
    return [`${who} read ${of}${together("were read by")}. ${these} ${hold}.`];
  }

  /** Makes a token the current one, from which steps go on. position: null for none. */
  settle(position) {
    this.at = position;
    this.text.point(position);
    this.tell(position);
  }

  /** Shows what attention a token got. */
  tell(position) {
    this.detail.textContent = "";
    if (position === null || !this.data) return;
    const shares = sharesAt(this.data, position);
    const name = `Token ${count.format(position)} ${quoted(this.text.token(position))}: `;
    const chosen = this.layer === null ? shares : [shares[this.layer]];
    const readers = chosen.filter((one) => one.read !== null).length;
    const sum = (kind) => chosen.reduce((all, one) => all + (one[kind] ?? 0), 0) / chosen.length;
    const layer = this.layer === null ? null : `layer ${chosen[0].layer}`;
    const whose = layer ? `${layer}'s attention` : `the attention, read by ${readers} of ${chosen.length} layers`;
    const got = readers ? `${exact(sum("read"))} of ${whose}` : `not read by ${layer ?? "any layer"}`;
    // a layer lists only its strongest tokens, so that the mean is a lower bound if one lacks this token
    const listed = chosen.filter((one) => one.dense !== null).length;
    const share = `${listed < chosen.length ? "at least " : ""}${exact(sum("dense"))}`;
    const would = listed ? `give it ${share}` : "not put it among the strongest";
    this.detail.textContent = `${name}${got}; reading everything would ${would}.`;
  }

  /** Moves to the token that is so many places weaker; negative: stronger. */
  step(places) {
    const { coloured } = this.shares;
    if (!coloured.length) return;
    const last = Math.min(coloured.length, this.text.order.length) - 1;
    this.text.reveal(coloured[Math.min(Math.max(coloured.indexOf(this.at) + places, 0), last)]);
    this.draw();
  }

  walk(event) {
    const mark = event.target.closest("mark");
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!mark || !step) return;
    event.preventDefault();
    const position = this.text.beside(Number(mark.dataset.position), step);
    if (position !== undefined) this.text.reveal(position);
  }

  /** After a new size, lines break elsewhere: the current token stays in the middle. */
  resized() {
    if (!this.isOpen || !this.data) return;
    if (this.at !== null) this.text.centre(this.at);
    this.draw();
  }

  /** Redraws the strip, after another view, scrolling, another size or other colours. */
  draw() {
    if (this.isOpen && this.data) this.strip.draw(this.shares, this.text.visible());
  }
}
