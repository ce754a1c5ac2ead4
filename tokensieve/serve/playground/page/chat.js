// The conversation: questions with their documents, and answers as they come.

import { shown } from "./documents.js";
import { element } from "./elements.js";
import { Answer, STOPPED } from "./reply.js";
import { Failure, chat } from "./server.js";
import { sampling } from "./settings.js";
import { chosen } from "./store.js";

/** In the order that the model was trained on: the documents, then the question. */
function prompt({ documents, text }) {
  return [...documents.map((document) => document.text), text].filter(Boolean).join("\n\n");
}

export class Chat {
  /**
   * log: the element that holds the turns. changed: called when an answer begins or ends, and after turns are removed.
   * edit: called with a turn whose question the reader wants to change.
   */
  constructor(log, changed, edit) {
    Object.assign(this, { log, changed, edit, turns: [], stopping: null, welcome: [...log.children] });
    Object.assign(this, { drawing: null, pause: 0 }); // the timer of the next drawing, and its milliseconds
  }

  get busy() {
    return this.stopping !== null;
  }

  /** The answer that an element belongs to. */
  answerOf(node) {
    const root = node.closest("article.answer");
    return this.turns.map((turn) => turn.answer).find((answer) => answer?.root === root);
  }

  /** Tokens of the conversation up to a turn, null for all of it, as far as they are known. */
  tokensBefore(turn) {
    const earlier = turn ? this.turns.slice(0, this.turns.indexOf(turn)) : this.turns;
    const answer = earlier.findLast((one) => one.answer?.promptIds)?.answer;
    return answer ? answer.promptIds.length + answer.ids.length : 0;
  }

  /** Removes everything, and stops the answer that is being written. */
  clear() {
    this.stop();
    this.turns = [];
    this.log.replaceChildren(...this.welcome);
    this.changed();
  }

  /** Removes a turn and all after it. */
  cut(turn) {
    const gone = this.turns.splice(this.turns.indexOf(turn));
    for (const { question, answer } of gone) for (const root of [question, answer.root]) root.remove();
    if (!this.turns.length) this.log.replaceChildren(...this.welcome);
    this.changed();
  }

  /** The conversation, for `restore`. */
  record() {
    return this.turns.map(({ text, documents, answer }) => ({ text, documents, answer: answer.record() }));
  }

  restore(turns) {
    for (const { text, documents, answer } of turns) {
      const turn = this.add(text, documents);
      turn.answer = Answer.restore(answer, () => this.again());
      this.log.append(turn.answer.root);
    }
    this.turns.forEach(({ answer }, i) => (answer.retry.hidden = i < this.turns.length - 1));
    this.follow(true);
    this.changed();
  }

  /** A question at the end of the log. */
  add(text, documents) {
    const turn = { text, documents };
    if (!this.turns.length) this.log.replaceChildren();
    this.turns.push(turn);
    const edit = element("button", { type: "button", className: "quiet", ariaLabel: "Edit the question" }, "Edit");
    edit.addEventListener("click", () => this.edit(turn));
    turn.question = element("div", { className: "question" }, ...documents.map(shown), element("p", {}, text), edit);
    this.log.append(turn.question);
    return turn;
  }

  stop() {
    this.stopping?.abort();
  }

  async send(text, documents) {
    await this.answer(this.add(text, documents));
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
    const read = this.tokensBefore(turn) + turn.documents.reduce((sum, document) => sum + (document.tokens ?? 0), 0);
    turn.answer = new Answer(model, read, () => this.again());
    this.log.append(turn.answer.root);
    turn.answer.wait();
    this.changed();
    this.follow(true);
    let problem;
    try {
      for await (const chunk of chat({ model, messages: this.messages(), ...sampling() }, stopping.signal)) {
        turn.answer.push(chunk);
        this.drawSoon(turn.answer);
      }
    } catch (error) {
      if (error.name !== "AbortError" && !(error instanceof Failure)) throw error;
      problem = error instanceof Failure ? error.message : STOPPED;
    } finally {
      clearTimeout(this.drawing);
      Object.assign(this, { drawing: null, pause: 0 });
      const atEnd = this.isAtEnd();
      turn.answer.end(problem);
      if (this.stopping === stopping) this.stopping = null;
      this.follow(atEnd);
      this.changed();
    }
  }

  /** Draws an answer and keeps its end in sight. The longer that takes, as for a long block of code, the less often. */
  drawSoon(answer) {
    this.drawing ??= setTimeout(() => {
      const [begin, atEnd] = [performance.now(), this.isAtEnd()];
      answer.draw();
      this.follow(atEnd);
      Object.assign(this, { drawing: null, pause: 4 * (performance.now() - begin) });
    }, this.pause);
  }

  isAtEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 80;
  }

  /** Keeps the newest line in sight, unless the reader has scrolled away. */
  follow(wanted) {
    if (wanted) this.log.scrollTop = this.log.scrollHeight;
  }
}
