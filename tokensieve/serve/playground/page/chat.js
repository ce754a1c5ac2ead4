// The conversation: questions with their documents, and answers as they come.

import { AnswerText } from "./answer.js";
import { shown } from "./documents.js";
import { element } from "./elements.js";
import { Failure, chat } from "./server.js";
import { sampling } from "./settings.js";
import { chosen } from "./store.js";

const count = new Intl.NumberFormat("en");

/** In the order that the model was trained on: the documents, then the question. */
function prompt({ documents, text }) {
  return [...documents.map((document) => document.text), text].filter(Boolean).join("\n\n");
}

class Answer {
  constructor(model, retry) {
    this.model = model;
    this.content = "";
    this.promptIds = null; // until the server sends them
    this.ids = []; // of the tokens that are shown
    this.unshown = []; // of tokens whose text is still to come: half a character, or the start of a stop word
    this.thought = element("div", { className: "text" });
    this.said = element("div", { className: "text" });
    const summary = element("summary", {}, "Reasoning");
    this.reasoning = element("details", { className: "reasoning", hidden: true }, summary, this.thought);
    this.failure = element("p", { className: "failure", hidden: true });
    this.usage = element("span", { className: "usage" });
    this.retry = element("button", { type: "button", className: "quiet" }, "Retry");
    this.retry.addEventListener("click", retry);
    this.foot = element("footer", { hidden: true }, this.usage, element("span", { className: "space" }), this.retry);
    this.root = element("article", { className: "answer", ariaLabel: "Answer", ariaBusy: "true" });
    this.root.append(this.reasoning, this.said, this.failure, this.foot);
    this.texts = { content: new AnswerText(this.said), reasoning_content: new AnswerText(this.thought) };
  }

  push(chunk) {
    this.promptIds ??= chunk.prompt_token_ids ?? null;
    if (chunk.usage) this.counts = chunk.usage;
    for (const { delta, token_ids: ids = [], finish_reason: finish } of chunk.choices) {
      this.unshown.push(...ids);
      this.finish = finish ?? this.finish;
      for (const [kind, text] of Object.entries(this.texts)) {
        if (!delta[kind]) continue;
        if (this.begun === undefined) this.begun = performance.now();
        if (kind === "reasoning_content") this.reasoning.hidden = false;
        else this.content += delta[kind];
        text.push(delta[kind], this.promptIds ? this.ids.length : null);
        this.ids.push(...this.unshown);
        this.unshown = [];
      }
    }
  }

  /** problem: a line of text, if the answer ended early. */
  end(problem) {
    for (const text of Object.values(this.texts)) text.finish();
    this.root.ariaBusy = "false";
    const cut = this.finish === "length" ? "Cut off: the answer reached its maximum length." : "";
    const unanswered = !this.content && !this.reasoning.hidden;
    if (unanswered) this.reasoning.open = true;
    this.failure.textContent = problem ?? (cut || (unanswered ? "The model stopped within its reasoning." : ""));
    this.failure.hidden = !this.failure.textContent;
    this.usage.textContent = this.usageText();
    this.foot.hidden = false;
  }

  usageText() {
    if (!this.counts) return "";
    const { prompt_tokens: read, completion_tokens: written, prompt_tokens_details: details } = this.counts;
    const seconds = (performance.now() - this.begun) / 1000;
    const parts = [`${count.format(read)} tokens read`];
    if (details?.cached_tokens) parts.push(`${count.format(details.cached_tokens)} of them cached`);
    parts.push(`${count.format(written)} written`);
    if (written > 1 && seconds > 0) parts.push(`${((written - 1) / seconds).toFixed(1)} tokens/s`);
    return parts.join(" · ");
  }
}

export class Chat {
  /** log: the element that holds the turns. changed: called when an answer begins or ends. */
  constructor(log, changed) {
    Object.assign(this, { log, changed, turns: [], stopping: null, welcome: [...log.children] });
  }

  get busy() {
    return this.stopping !== null;
  }

  /** The answer that an element belongs to. */
  answerOf(node) {
    const root = node.closest("article.answer");
    return this.turns.map((turn) => turn.answer).find((answer) => answer?.root === root);
  }

  clear() {
    this.stop();
    this.turns = [];
    this.log.replaceChildren(...this.welcome);
  }

  stop() {
    this.stopping?.abort();
  }

  async send(text, documents) {
    const turn = { text, documents };
    if (!this.turns.length) this.log.replaceChildren();
    this.turns.push(turn);
    this.log.append(element("div", { className: "question" }, ...documents.map(shown), element("p", {}, text)));
    await this.answer(turn);
  }

  async again() {
    const turn = this.turns.at(-1);
    if (this.busy || !turn) return;
    turn.answer.root.remove();
    await this.answer(turn);
  }

  /** The conversation so far. A question without an answer is left out, unless it is the last one. */
  messages() {
    const { system } = chosen();
    const messages = this.turns.flatMap((turn, i) => {
      const question = { role: "user", content: prompt(turn) };
      if (i === this.turns.length - 1) return [question];
      return turn.answer.content ? [question, { role: "assistant", content: turn.answer.content }] : [];
    });
    return [...(system ? [{ role: "system", content: system }] : []), ...messages];
  }

  async answer(turn) {
    const { model } = chosen();
    const stopping = (this.stopping = new AbortController());
    for (const { answer } of this.turns) if (answer) answer.retry.hidden = true;
    turn.answer = new Answer(model, () => this.again());
    this.log.append(turn.answer.root);
    this.changed();
    this.follow(true);
    let problem;
    try {
      for await (const chunk of chat({ model, messages: this.messages(), ...sampling() }, stopping.signal)) {
        const atEnd = this.isAtEnd();
        turn.answer.push(chunk);
        this.follow(atEnd);
      }
    } catch (error) {
      if (error.name !== "AbortError" && !(error instanceof Failure)) throw error;
      problem = error instanceof Failure ? error.message : "Stopped.";
    } finally {
      const atEnd = this.isAtEnd();
      turn.answer.end(problem);
      turn.answer.root.classList.toggle("failed", problem !== undefined && problem !== "Stopped.");
      if (this.stopping === stopping) this.stopping = null;
      this.follow(atEnd);
      this.changed();
    }
  }

  isAtEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 80;
  }

  /** Keeps the newest line in sight, unless the reader has scrolled away. */
  follow(wanted) {
    if (wanted) this.log.scrollTop = this.log.scrollHeight;
  }
}
