// What the reader chose, kept by the browser. A value of the wrong type means the usual one; a browser that keeps nothing still does
// what it is told until the page is closed.

const KEY = "tokensieve";
const USUAL = { theme: "auto", model: "", system: "", temperature: 0.3, top_p: null, max_tokens: null, seed: null, thinking: false };
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"]; // or null: the server's

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? {};
  } catch {
    return {};
  }
}

function checked(values) {
  const fits = (name, value) =>
    NUMBERS.includes(name) ? value === null || typeof value === "number" : typeof value === typeof USUAL[name];
  return Object.fromEntries(Object.entries(USUAL).map(([name, usual]) => [name, fits(name, values[name]) ? values[name] : usual]));
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
    // a private window may refuse
  }
}

/** Back to the usual, but for the model. */
export function forget() {
  choose({ ...USUAL, model: now.model });
}
