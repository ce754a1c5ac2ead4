// Text from bytes. UTF-8 and UTF-16 are told from the bytes; other bytes without control characters count as Latin-1.

const MARKS = { "UTF-16LE": [0xff, 0xfe], "UTF-16BE": [0xfe, 0xff] };
const CONTROL = /[\0-\x08\x0e-\x1a\x1c-\x1f]/; // what text has not, but for the escape of coloured logs

function strictly(encoding, bytes) {
  try {
    return new TextDecoder(encoding, { fatal: true }).decode(bytes);
  } catch {
    return null; // the bytes are no text in this encoding
  }
}

/** {text, encoding}, or null if the bytes are no text. */
export function decoded(bytes) {
  const marked = Object.keys(MARKS).find((name) => MARKS[name].every((byte, i) => bytes[i] === byte));
  for (const encoding of marked ? [marked] : ["UTF-8", "windows-1252"]) {
    const text = strictly(encoding, bytes);
    if (text === null) continue;
    const isText = encoding === "UTF-8" ? !text.includes("\0") : !CONTROL.test(text);
    return isText ? { text, encoding: encoding === "windows-1252" ? "Latin-1" : encoding } : null;
  }
  return null;
}
