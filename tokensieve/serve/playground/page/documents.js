// The documents that go with the next question: read in the browser, but for PDFs, which the server turns into text.

import { element } from "./elements.js";
import { Failure, textOfPdf } from "./server.js";

const MOST_BYTES = 16 * 2 ** 20; // the server takes no more
const kilo = (characters) => (characters < 1000 ? `${characters}` : `${(characters / 1000).toFixed(characters < 1e5 ? 1 : 0)}k`);

/** {name, text, note}. Failure where there is no text in it. */
async function read(file) {
  if (file.size > MOST_BYTES) throw new Failure(`${file.name} is larger than 16 MiB.`);
  const begin = await file.slice(0, 1024).text();
  if (begin.trimStart().startsWith("%PDF-")) {
    try {
      const { text, pages } = await textOfPdf(file);
      return { name: file.name, text, note: `${pages} ${pages === 1 ? "page" : "pages"}, ${kilo(text.length)} characters` };
    } catch (error) {
      throw new Failure(`${file.name}: ${error.message}`);
    }
  }
  const bytes = await file.arrayBuffer();
  let text = "\0";
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    // told below
  }
  if (text.includes("\0")) throw new Failure(`${file.name} is neither text in UTF-8 nor a PDF.`);
  if (!text.trim()) throw new Failure(`${file.name} is empty.`);
  return { name: file.name, text, note: `${kilo(text.length)} characters` };
}

/** A document as it is shown with a question: its name, and on request its text. */
export function shown(document) {
  const name = element("summary", {}, element("b", {}, document.name), " ", element("span", {}, document.note));
  return element("details", { className: "document" }, name, element("pre", {}, document.text));
}

export class Documents {
  /** tray: the list that shows them. changed: called when one was added or removed. failed: called with a line. */
  constructor(tray, changed, failed) {
    Object.assign(this, { tray, changed, failed, kept: new Map(), reading: 0 });
  }

  /** One after the other, in their order. */
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

  /** All of them, and none is left. */
  take() {
    const taken = [...this.kept.values()];
    for (const item of [...this.kept.keys()]) this.remove(item);
    return taken;
  }
}
