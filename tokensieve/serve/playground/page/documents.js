// The documents of the next question. They are read in the browser, except for PDFs, which the server turns into text.

import { element } from "./elements.js";
import { decoded } from "./encoding.js";
import { Failure, textOfPdf, tokensOf } from "./server.js";

const MAX_BYTES = 16 * 2 ** 20; // the server's limit
const count = new Intl.NumberFormat("en");

/** {name, text, notes}: notes are what the reader should know of it. Failure if the file holds no text. */
async function textOf(file) {
  const { name } = file;
  if (file.size > MAX_BYTES) throw new Failure(`${name} is larger than 16 MiB.`);
  const begin = await file.slice(0, 1024).text();
  if (begin.trimStart().startsWith("%PDF-")) {
    try {
      const { text, pages } = await textOfPdf(file);
      return { name, text, notes: [`${pages} ${pages === 1 ? "page" : "pages"}`] };
    } catch (error) {
      throw new Failure(`${name}: ${error.message}`);
    }
  }
  const found = decoded(new Uint8Array(await file.arrayBuffer()));
  if (!found) throw new Failure(`${name} is neither text nor a PDF. If it is text, save it as UTF-8.`);
  if (!found.text.trim()) throw new Failure(`${name} is empty.`);
  return { name, text: found.text, notes: found.encoding === "UTF-8" ? [] : [`read as ${found.encoding}`] };
}

/** {name, text, note, tokens}. tokens: null until `measure` knows them. */
async function read(file) {
  const { name, text, notes } = await textOf(file);
  return { name, text, notes, note: [...notes, `${count.format(text.length)} characters`].join(", "), tokens: null };
}

/** A document with its length in tokens; unchanged if the server does not tell, which keeps no document away. */
async function measure(document) {
  try {
    const tokens = await tokensOf(document.text);
    return { ...document, tokens, note: [...document.notes, `${count.format(tokens)} tokens`].join(", ") };
  } catch (error) {
    if (error instanceof Failure) return document;
    throw error;
  }
}

/** A document as it appears with a question: its name, and its text when opened. */
export function shown(document) {
  const name = element("summary", {}, element("b", {}, document.name), " ", element("span", {}, document.note));
  return element("details", { className: "document" }, name, element("pre", {}, document.text));
}

export class Documents {
  /**
   * tray: the list that shows them. changed: called after one is added or removed. failed: called with a line of text.
   */
  constructor(tray, changed, failed) {
    Object.assign(this, { tray, changed, failed, kept: new Map(), reading: 0 });
  }

  /** Reads the files one after the other. */
  async add(files) {
    for (const file of files) {
      const item = element("li", { className: "chip" }, element("span", {}, `Reading ${file.name}…`));
      this.tray.append(item);
      this.reading += 1;
      this.changed();
      try {
        this.show(item, await read(file));
        this.measuring = this.measure(item);
      } catch (error) {
        item.remove();
        this.failed(error instanceof Failure ? error.message : `${file.name} cannot be read.`);
      }
      this.reading -= 1;
      this.changed();
    }
  }

  /** Until a document is measured, it shows its characters, and may be sent. */
  async measure(item) {
    const measured = await measure(this.kept.get(item));
    if (!this.kept.has(item)) return;
    this.kept.set(item, measured);
    item.querySelector("span").textContent = measured.note;
    this.changed();
  }

  show(item, document) {
    const remove = element("button", { type: "button", ariaLabel: `Remove ${document.name}` }, "×");
    remove.addEventListener("click", () => this.remove(item));
    item.replaceChildren(element("b", {}, document.name), element("span", {}, document.note), remove);
    this.kept.set(item, document);
  }

  /** Documents that were read before. */
  put(documents) {
    for (const document of documents) {
      const item = element("li", { className: "chip" });
      this.tray.append(item);
      this.show(item, document);
    }
    this.changed();
  }

  get tokens() {
    return [...this.kept.values()].reduce((sum, document) => sum + (document.tokens ?? 0), 0);
  }

  remove(item) {
    this.kept.delete(item);
    item.remove();
    this.changed();
  }

  /** Removes all documents and returns them. */
  take() {
    const taken = [...this.kept.values()];
    for (const item of [...this.kept.keys()]) this.remove(item);
    return taken;
  }
}
