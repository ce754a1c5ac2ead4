// Runs before the first paint, so that a page in the dark never flashes.

import { chosen } from "./store.js";

export function applyTheme() {
  document.documentElement.dataset.theme = chosen().theme;
}

applyTheme();
