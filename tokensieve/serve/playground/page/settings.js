// The settings dialog. A change is stored at once, unless it is out of range.

import { find } from "./elements.js";
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
    input.ariaInvalid = null;
  }
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
  find("close-settings").addEventListener("click", () => dialog.close());
  find("reset-settings").addEventListener("click", () => {
    forget();
    fill(dialog);
    show();
  });
  dialog.addEventListener("input", ({ target }) => {
    const fine = target.checkValidity();
    target.ariaInvalid = fine ? null : "true";
    if (fine) choose({ [target.name]: (VALUES[target.type] ?? (() => target.value))(target) });
    show();
  });
}

/** The settings as fields of a request; settings that are empty are left out. */
export function sampling() {
  const { temperature, top_p, max_tokens, seed, thinking } = chosen();
  const fields = Object.entries({ temperature, top_p, max_tokens, seed }).filter(([, value]) => value !== null);
  return { ...Object.fromEntries(fields), ...(thinking ? { chat_template_kwargs: { thinking } } : {}) };
}
