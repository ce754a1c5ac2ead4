// The documents of the next question. They are read in the browser, except for PDFs, which the server turns into text.

import { element } from "./elements.js";
import { Failure, textOfPdf } from "./server.js";

const MAX_BYTES = 16 * 2 ** 20; // the server's limit
const kilo = (characters) =>
  characters < 1000 ? `${characters}` : `${(characters / 1000).toFixed(characters < 1e5 ? 1 : 0)}k`;

/** {name, text, note}. Failure if the file holds no text. */
async function read(file) {
  if (file.size > MAX_BYTES) throw new Failure(`${file.name} is larger than 16 MiB.`);
  const begin = await file.slice(0, 1024).text();
  if (begin.trimStart().startsWith("%PDF-")) {
    try {
      const { text, pages } = await textOfPdf(file);
      const length = `${pages} ${pages === 1 ? "page" : "pages"}, ${kilo(text.length)} characters`;
      return { name: file.name, text, note: length };
    } catch (error) {
      throw new Failure(`${file.name}: ${error.message}`);
    }
  }
  const bytes = await file.arrayBuffer();
  let text = "\0";
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    // reported below
  }
  if (text.includes("\0")) throw new Failure(`${file.name} is neither text in UTF-8 nor a PDF.`);
  if (!text.trim()) throw new Failure(`${file.name} is empty.`);
  return { name: file.name, text, note: `${kilo(text.length)} characters` };
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
        const document = await read(file);
        const remove = element("button", { type: "button", ariaLabel: `Remove ${document.name}` }, "×");
        remove.addEventListener("click", () => this.remove(item));
        item.replaceChildren(element("b", {}, document.name), element("span", {}, document.note), remove);
        this.kept.set(item, document);
      } catch (error) {
        item.remove();
        this.failed(error instanceof Failure ? error.message : `${file.name} cannot be read.`);
      }
      this.reading -= 1;
      this.changed();
    }
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
