/** A new element. Strings become text nodes, so text from a model or a document is never parsed as HTML. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function find(id) {
  return document.getElementById(id);
}
