// Runs before the first paint, so that a dark page does not flash.

import { chosen } from "./store.js";

export function applyTheme() {
  document.documentElement.dataset.theme = chosen().theme;
}

applyTheme();
