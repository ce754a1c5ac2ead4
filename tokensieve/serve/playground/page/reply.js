// One answer: its reasoning, its text as it comes, and what it cost.

import { AnswerText } from "./answer.js";
import { copyButton, element } from "./elements.js";

const count = new Intl.NumberFormat("en");
export const STOPPED = "Stopped.";
const ONLY_REASONING =
  "The model ended without an answer: it wrote only reasoning. Ask again, or turn thinking off in the settings.";

export class Answer {
  /** expected: tokens that the model reads for it, as far as they are known. retry: called by its button. */
  constructor(model, expected, retry) {
    this.model = model;
    this.content = "";
    this.pieces = []; // [kind, text, at], as AnswerText takes them
    this.promptIds = null; // until the server sends them
    this.ids = []; // of the tokens that are shown
    this.unshown = []; // of tokens whose text is still to come: half a character, or the start of a stop word
    this.thought = element("div", { className: "text" });
    this.said = element("div", { className: "text" });
    const summary = element("summary", {}, "Reasoning");
    this.reasoning = element("details", { className: "reasoning", hidden: true }, summary, this.thought);
    this.failure = element("p", { className: "failure", hidden: true });
    this.bar = element("progress", { ariaLabel: "Reading", hidden: true });
    this.told = element("span", { ariaHidden: "true" });
    this.waiting = element("p", { className: "wait" }, this.told, this.bar);
    this.usage = element("span", { className: "usage" });
    this.source = element("button", { type: "button", className: "quiet", ariaPressed: "false" }, "Markup");
    this.source.title = "Show the marks of Markdown, which are tokens too";
    this.source.addEventListener("click", () => {
      this.source.ariaPressed = String(this.root.classList.toggle("source"));
    });
    this.retry = element("button", { type: "button", className: "quiet" }, "Retry");
    this.retry.addEventListener("click", retry);
    const buttons = [this.source, copyButton("Copy the answer", () => this.content), this.retry];
    this.foot = element("footer", { hidden: true }, this.usage, element("span", { className: "space" }), ...buttons);
    this.root = element("article", { className: "answer", ariaLabel: "Answer", ariaBusy: "true" });
    this.root.append(this.reasoning, this.said, this.waiting, this.failure, this.foot);
    this.texts = { content: new AnswerText(this.said), reasoning_content: new AnswerText(this.thought) };
    this.expected = expected;
  }

  /** Counts the seconds until the first text comes. */
  wait() {
    const asked = performance.now();
    const tell = () => {
      const seconds = Math.floor((performance.now() - asked) / 1000);
      const read = this.promptIds?.length ?? this.expected;
      const what = read ? `${count.format(read)} tokens` : "your question";
      if (seconds > 0 && this.bar.hidden) this.told.textContent = `Reading ${what}… ${seconds} s`;
    };
    this.timer = setInterval(tell, 250);
  }

  /** Shows how much of the prompt has been read, and how long the rest will take at the pace so far. */
  progress({ total, processed }) {
    const now = performance.now();
    this.first ??= { processed, now };
    const pace = (processed - this.first.processed) / (now - this.first.now); // tokens per millisecond
    const left = pace > 0 ? `, about ${Math.ceil((total - processed) / pace / 1000)} s left` : "";
    this.told.textContent = `Reading: ${count.format(processed)} of ${count.format(total)} tokens${left}`;
    Object.assign(this.bar, { max: total, value: processed, hidden: false });
  }

  waited() {
    clearInterval(this.timer);
    this.waiting.remove();
  }

  push(chunk) {
    this.promptIds ??= chunk.prompt_token_ids ?? null;
    if (chunk.usage) this.counts = chunk.usage;
    if (chunk.prompt_progress) this.progress(chunk.prompt_progress);
    for (const { delta, token_ids: ids = [], finish_reason: finish } of chunk.choices) {
      this.unshown.push(...ids);
      this.finish = finish ?? this.finish;
      for (const kind of Object.keys(this.texts)) {
        if (!delta[kind]) continue;
        if (this.begun === undefined) this.begun = performance.now();
        this.write(kind, delta[kind], this.promptIds ? this.ids.length : null);
        this.ids.push(...this.unshown);
        this.unshown = [];
      }
    }
  }

  draw() {
    for (const text of Object.values(this.texts)) text.draw();
  }

  write(kind, text, at) {
    this.waited();
    if (kind === "reasoning_content") this.reasoning.hidden = false;
    else this.content += text;
    this.texts[kind].push(text, at);
    this.pieces.push([kind, text, at]);
  }

  /** problem: a line of text, if the answer ended early. */
  end(problem) {
    this.waited();
    for (const text of Object.values(this.texts)) text.finish();
    this.root.ariaBusy = "false";
    const cut = this.finish === "length" ? "Cut off: the answer reached its maximum length." : "";
    const unanswered = !this.reasoning.hidden && !this.content.trim();
    if (unanswered) this.reasoning.open = true;
    this.problem = problem;
    this.failure.textContent = problem ?? [cut, unanswered ? ONLY_REASONING : ""].filter(Boolean).join(" ");
    this.failure.hidden = !this.failure.textContent;
    this.usage.textContent ||= this.usageText();
    this.foot.hidden = false;
    this.source.hidden = !Object.values(this.texts).some((text) => text.isMarkedUp);
    this.root.classList.toggle("failed", problem !== undefined && problem !== STOPPED);
  }

  /** A token's text, which may be shown in several parts. at: number of the answer's tokens before it. */
  textAt(at) {
    return this.pieces.filter(([, , one]) => one === at).map(([, text]) => text).join("");
  }

  /** What `restore` makes the same answer from. */
  record() {
    const { model, pieces, promptIds, ids, finish, problem } = this;
    return { model, pieces, promptIds, ids, finish, problem, usage: this.usage.textContent };
  }

  static restore({ pieces, usage, problem, ...kept }, retry) {
    const answer = Object.assign(new Answer(kept.model, 0, retry), kept);
    for (const piece of pieces) answer.write(...piece);
    answer.usage.textContent = usage;
    answer.end(problem);
    return answer;
  }

  usageText() {
    if (!this.counts) return "";
    const { prompt_tokens: conversation, completion_tokens: written, prompt_tokens_details: details } = this.counts;
    const seconds = (performance.now() - this.begun) / 1000;
    const parts = [`${count.format(conversation)} tokens in the conversation`];
    if (details?.cached_tokens) parts.push(`${count.format(details.cached_tokens)} of them cached`);
    parts.push(`${count.format(written)} written`);
    if (written > 1 && seconds > 0) parts.push(`${((written - 1) / seconds).toFixed(1)} tokens/s`);
    return parts.join(" · ");
  }
}
