// The reader's settings, stored by the browser. A value of the wrong type is replaced by the default. If the browser
// stores nothing, the settings last until the page is closed.

const KEY = "tokensieve";
const DEFAULTS = {
  theme: "auto",
  model: "",
  system: "",
  temperature: 0.3,
  top_p: null,
  max_tokens: null,
  seed: null,
  thinking: false,
  keep: false, // whether the conversation is kept, too
  guide: true, // whether the lens explains itself
};
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"]; // or null: the server's default

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? {};
  } catch {
    return {};
  }
}

function checked(values) {
  const fits = (name, value) =>
    NUMBERS.includes(name) ? value === null || typeof value === "number" : typeof value === typeof DEFAULTS[name];
  const valid = ([name, value]) => [name, fits(name, values[name]) ? values[name] : value];
  return Object.fromEntries(Object.entries(DEFAULTS).map(valid));
}

const now = checked(kept());

export function chosen() {
  return now;
}

export function choose(changes) {
  Object.assign(now, changes);
  try {
    localStorage.setItem(KEY, JSON.stringify(now));
  } catch {
    // a private window may refuse to store anything
  }
}

/** Resets all settings to the defaults but those outside of the dialog. */
export function forget() {
  const { model, keep, guide } = now;
  choose({ ...DEFAULTS, model, keep, guide });
}
