// Connects the parts of the page.

import { beside, reach } from "./answer.js";
import { Chat } from "./chat.js";
import { download, drop, keep, kept, markdown } from "./conversation.js";
import { Documents } from "./documents.js";
import { element, find } from "./elements.js";
import { example } from "./example.js";
import { Lens } from "./lens.js";
import { Failure, models } from "./server.js";
import { installSettings } from "./settings.js";
import { choose, chosen } from "./store.js";

const [log, question, notice, model] = ["log", "question", "notice", "model"].map(find);
const count = new Intl.NumberFormat("en");
const limits = new Map(); // by the model's name: tokens of a conversation and its answer
let chosenToken = null; // the token that the lens shows
let editing = null; // the turn whose question is being changed
let safe = true; // whether a reload loses nothing

function say(line) {
  notice.textContent = line;
  notice.hidden = !line;
}

function refresh() {
  find("send").hidden = chat.busy;
  find("stop").hidden = !chat.busy;
  find("send").disabled = documents.reading > 0 || model.disabled;
  find("export").disabled = chat.busy || !chat.turns.length;
  for (const button of log.querySelectorAll(".question button")) button.disabled = chat.busy;
  find("editing").hidden = !editing;
  find("words").hidden = !log.querySelector(".token");
  const [used, limit] = [tokens(), limits.get(model.value)];
  find("room").textContent = used && limit ? `${count.format(used)} of ${count.format(limit)} tokens` : "";
  find("room").classList.toggle("full", used >= limit);
  store();
}

/** Tokens of the next prompt, as far as they are known. */
function tokens() {
  return chat.tokensBefore(editing) + documents.tokens;
}

/** Keeps the conversation if the reader wants it. An answer that is being written is kept once it has ended. */
function store() {
  safe = !chat.turns.length;
  if (chat.busy) return;
  if (!chosen().keep || safe) drop();
  else if (keep(chat.record())) safe = true;
  else say("This conversation is too large for the browser to keep. Export it before you leave.");
}

const documents = new Documents(find("tray"), refresh, say);
const chat = new Chat(log, refresh, edit);
const lens = new Lens(find("lens"), () => {
  document.body.classList.remove("with-lens"); // first: on a phone the conversation is hidden by it
  chosenToken?.classList.remove("chosen");
  chosenToken?.focus();
});

// asking

function fit() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

async function send() {
  await ready; // one can ask before the models are known
  const text = question.value.trim();
  if (chat.busy || find("send").disabled || !(text || documents.kept.size)) return;
  const [used, limit] = [tokens(), limits.get(model.value)];
  if (used >= limit) {
    const remedy = documents.kept.size ? "Remove a document." : "Begin a new chat.";
    say(`Too long: ${count.format(used)} tokens, and the answer, do not fit into ${count.format(limit)}. ${remedy}`);
    return;
  }
  if (editing) finishEditing((turn) => chat.cut(turn));
  say("");
  question.value = "";
  fit();
  chat.send(text, documents.take());
}

/** Puts a question back into the composer. Nothing is removed before the new one is sent. */
function edit(turn) {
  if (editing) finishEditing(() => documents.take());
  editing = turn;
  question.value = turn.text;
  documents.put(turn.documents);
  fit();
  question.focus();
}

function finishEditing(act) {
  const turn = editing;
  editing = null;
  act(turn);
  if (lens.isOpen && !chosenToken.isConnected) lens.close();
}

find("keep-question").addEventListener("click", () => {
  finishEditing(() => documents.take());
  question.value = "";
  fit();
  refresh();
  question.focus();
});

question.addEventListener("input", fit);
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
find("stop").addEventListener("click", () => chat.stop());
find("new").addEventListener("click", () => {
  if (lens.isOpen) lens.close();
  chosenToken = editing = null;
  chat.clear();
  say("");
  question.focus();
});

// A button that was pressed by a key, and goes with what it did, hands the focus to the question.
for (const part of [log, find("tray"), find("stop")]) {
  part.addEventListener("click", ({ detail, target }) => {
    if (detail === 0 && (part === target || !target.isConnected)) question.focus();
  });
}

// the conversation outside of the page

find("export").addEventListener("click", () => download("conversation.md", markdown(chat.turns)));
find("keep").checked = chosen().keep;
find("keep").addEventListener("change", ({ target }) => {
  choose({ keep: target.checked });
  say("");
  store();
});
addEventListener("beforeunload", (event) => {
  if (chat.busy || !safe || documents.kept.size) event.preventDefault(); // the browser asks the reader
});

// documents

find("example").addEventListener("click", async ({ detail }) => {
  try {
    const { file, text } = await example();
    await documents.add([file]);
    await documents.measuring;
    question.value = text;
    send();
    if (detail === 0) question.focus();
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    say(error.message);
  }
});

find("attach").addEventListener("click", () => find("files").click());
find("files").addEventListener("change", async ({ target }) => {
  const files = [...target.files];
  target.value = ""; // so that the same file can be chosen again
  say("");
  await documents.add(files);
});

const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
addEventListener("dragover", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dragging");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
addEventListener("drop", async (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  document.body.classList.remove("dragging");
  say("");
  await documents.add([...event.dataTransfer.files]);
  question.focus();
});

// the lens

function inspect(token) {
  const answer = chat.answerOf(token);
  if (!answer?.promptIds) return;
  chosenToken?.classList.remove("chosen");
  chosenToken = token;
  token.classList.add("chosen");
  reach(token);
  document.body.classList.add("with-lens");
  const at = Number(token.dataset.at);
  const ids = [...answer.promptIds, ...answer.ids.slice(0, at)];
  lens.open({ model: answer.model, ids, token: answer.textAt(at) });
}

log.addEventListener("click", ({ target }) => {
  const token = target.closest(".token");
  if (token && !target.closest("a") && getSelection().isCollapsed) inspect(token);
});
log.addEventListener("keydown", (event) => {
  if (!event.target.matches(".token")) return;
  const other = beside(event.target, event.key);
  if (other) {
    reach(other);
    other.focus();
  } else if (event.key === "Enter" || event.key === " ") inspect(event.target);
  else return;
  event.preventDefault();
});

addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || find("settings").open) return;
  if (lens.isOpen) lens.close();
  else chat.stop();
});

// settings and models

installSettings(() => lens.draw());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => lens.draw());

async function loadModels() {
  try {
    const served = await models();
    const names = served.map(({ name }) => name);
    for (const { name, limit } of served) limits.set(name, limit);
    model.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
    model.value = names.includes(chosen().model) ? chosen().model : names[0];
    choose({ model: model.value });
    model.disabled = false;
  } catch (error) {
    say(error.message);
    const again = element("button", { type: "button", className: "quiet" }, "Retry");
    again.addEventListener("click", loadModels);
    notice.append(" ", again);
    return;
  } finally {
    refresh();
  }
  say("");
}

model.addEventListener("change", () => {
  choose({ model: model.value });
  refresh();
});
if (chosen().keep) chat.restore(kept());
const ready = loadModels();
await ready;
question.focus();
