// The settings dialog. A change is stored at once, unless it is out of range.

import { element, find } from "./elements.js";
import { choose, chosen, forget } from "./store.js";
import { applyTheme } from "./theme.js";

const VALUES = {
  number: (input) => (input.value === "" ? null : input.valueAsNumber),
  checkbox: (input) => input.checked,
};

function fill(dialog) {
  const now = chosen();
  for (const input of dialog.querySelectorAll("[name]")) {
    if (input.type === "checkbox") input.checked = now[input.name];
    else if (input.type === "radio") input.checked = input.value === now[input.name];
    else input.value = now[input.name] ?? "";
    judge(input);
  }
}

/** Says below an input what is wrong with its value, and returns whether nothing is. */
function judge(input) {
  const fine = input.checkValidity();
  input.ariaInvalid = fine ? null : "true";
  const line = input.parentElement.querySelector(".wrong");
  if (line) line.textContent = fine ? "" : complaint(input);
  return fine;
}

function complaint({ name, min, max, step }) {
  const kind = step === "1" ? "whole number" : "number";
  const range = max ? `from ${min} to ${max}` : `of at least ${min}`;
  const now = chosen()[name];
  return `Not used: this takes a ${kind} ${range}, or nothing. ${now === null ? "The default" : now} holds.`;
}

export function installSettings(themed) {
  const dialog = find("settings");
  const show = () => {
    applyTheme();
    themed();
  };
  find("open-settings").addEventListener("click", () => {
    fill(dialog);
    dialog.showModal();
  });
  find("close-settings").addEventListener("click", () => {
    const wrong = dialog.querySelector("[aria-invalid]");
    if (wrong) wrong.focus();
    else dialog.close();
  });
  for (const input of dialog.querySelectorAll("[type=number]")) {
    input.after(element("p", { className: "wrong", role: "alert" }));
  }
  find("reset-settings").addEventListener("click", () => {
    forget();
    fill(dialog);
    show();
  });
  dialog.addEventListener("input", ({ target }) => {
    if (judge(target)) choose({ [target.name]: (VALUES[target.type] ?? (() => target.value))(target) });
    show();
  });
}

/** The settings as fields of a request; settings that are empty are left out. */
export function sampling() {
  const { temperature, top_p, max_tokens, seed, thinking } = chosen();
  const fields = Object.entries({ temperature, top_p, max_tokens, seed }).filter(([, value]) => value !== null);
  return { ...Object.fromEntries(fields), ...(thinking ? { chat_template_kwargs: { thinking } } : {}) };
}
