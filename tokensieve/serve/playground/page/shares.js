// Each token's share of the attention. Numbers only: nothing is drawn here.

/** Kinds of tokens in the view "difference". */
export const BOTH = 0;
export const ONLY_READ = 1;
export const ONLY_DENSE = 2;

/**
 * The shares of one view. layer: its index in the list, or null for the mean of all layers. aside: a set of positions.
 *
 * Returns {values, kinds, ranked, coloured}: the share and the kind of each position; the positions that are listed,
 * the strongest first; and those of them that are not aside, or all if no other is left.
 */
export function sharesOf({ context, layers }, layer, view, aside) {
  const chosen = layer === null ? layers : [layers[layer]];
  const read = new Float64Array(context);
  const dense = new Float64Array(context);
  const listed = new Uint8Array(context);
  const kinds = new Uint8Array(context);
  for (const one of chosen) {
    const inRead = new Set(one.selected);
    const inDense = new Set(one.dense);
    one.selected.forEach((position, i) => {
      if (view === "difference" && inDense.has(position)) return;
      read[position] += one.attention[i] / chosen.length;
      if (view !== "dense") listed[position] = 1;
    });
    one.dense.forEach((position, i) => {
      if (view === "difference" && inRead.has(position)) return;
      dense[position] += one.dense_attention[i] / chosen.length;
      if (view !== "read") listed[position] = 1;
    });
  }
  const values = view === "dense" ? dense : read;
  const ranked = [];
  for (let position = 0; position < context; position++) {
    if (!listed[position]) continue;
    if (view === "difference") {
      kinds[position] = read[position] >= dense[position] ? ONLY_READ : ONLY_DENSE;
      values[position] = Math.max(read[position], dense[position]);
    }
    ranked.push(position);
  }
  ranked.sort((a, b) => values[b] - values[a] || a - b);
  const others = ranked.filter((position) => !aside.has(position));
  return { values, kinds, ranked, coloured: others.length ? others : ranked };
}

const NEIGHBOURS = 8; // every token attends to the last ones before it

/**
 * Tokens that get attention whatever is written, by name: {markers, neighbours}, arrays of positions. The first token
 * counts as a marker, because models rest their attention on it.
 */
export function everyday({ context, markers }) {
  const neighbours = Math.min(NEIGHBOURS, Math.floor(context / 4));
  return {
    markers: [...new Set([0, ...markers])],
    neighbours: Array.from({ length: neighbours }, (_, i) => context - neighbours + i),
  };
}

/** How strongly a share is shown, from 0 to 9. By its square root, because most of the attention goes to few tokens. */
export function level(value, most) {
  return most > 0 ? Math.round(9 * Math.sqrt(value / most)) : 0;
}

/** One token's shares: [{layer, read, dense}]. Each is a share, or null if the layer's list lacks the token. */
export function sharesAt({ layers }, position) {
  const at = (positions, shares) => {
    const i = positions.indexOf(position);
    return i < 0 ? null : shares[i];
  };
  return layers.map((one) => ({
    layer: one.layer,
    read: at(one.selected, one.attention),
    dense: at(one.dense, one.dense_attention),
  }));
}
