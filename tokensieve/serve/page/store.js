// What the reader chose, kept by the browser. A value of the wrong type, or a browser that keeps nothing, means the usual one.

const KEY = "tokensieve";

export const USUAL = { theme: "auto", model: "", system: "", temperature: 0.3, top_p: null, max_tokens: null, seed: null, thinking: false };

export function chosen() {
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem(KEY)) ?? {};
  } catch {
    // never written, or not by this page
  }
  const fits = ([name, usual]) => {
    const value = kept[name];
    const nothing = usual === null || name === "temperature";
    const same = typeof value === (nothing ? "number" : typeof usual) || (nothing && value === null);
    return [name, same ? value : usual];
  };
  return Object.fromEntries(Object.entries(USUAL).map(fits));
}

export function choose(changes) {
  try {
    localStorage.setItem(KEY, JSON.stringify({ ...chosen(), ...changes }));
  } catch {
    // a private window may refuse
  }
}

export function forget() {
  choose(USUAL);
}
