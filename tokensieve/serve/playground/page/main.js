// Connects the parts of the page.

import { beside, reach } from "./answer.js";
import { Chat } from "./chat.js";
import { Documents } from "./documents.js";
import { element, find } from "./elements.js";
import { Lens } from "./lens.js";
import { models } from "./server.js";
import { installSettings } from "./settings.js";
import { choose, chosen } from "./store.js";

const [log, question, notice, model] = ["log", "question", "notice", "model"].map(find);
let chosenToken = null; // the token that the lens shows

function say(line) {
  notice.textContent = line;
  notice.hidden = !line;
}

function refresh() {
  find("send").hidden = chat.busy;
  find("stop").hidden = !chat.busy;
  find("send").disabled = documents.reading > 0 || model.disabled;
}

const documents = new Documents(find("tray"), refresh, say);
const chat = new Chat(log, refresh);
const lens = new Lens(find("lens"), () => {
  chosenToken?.classList.remove("chosen");
  chosenToken?.focus();
  document.body.classList.remove("with-lens");
});

// asking

function fit() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

function send() {
  const text = question.value.trim();
  if (chat.busy || find("send").disabled || !(text || documents.kept.size)) return;
  say("");
  question.value = "";
  fit();
  chat.send(text, documents.take());
}

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
  chosenToken = null;
  chat.clear();
  say("");
  refresh();
  question.focus();
});

// documents

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
  lens.open({ model: answer.model, ids: [...answer.promptIds, ...answer.ids.slice(0, at)], token: token.textContent });
}

log.addEventListener("click", ({ target }) => {
  const token = target.closest(".token");
  if (token && getSelection().isCollapsed) inspect(token);
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
    const names = await models();
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

model.addEventListener("change", () => choose({ model: model.value }));
await loadModels();
question.focus();
