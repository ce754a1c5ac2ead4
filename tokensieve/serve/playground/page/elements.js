/** An element. Children that are strings become text nodes: nothing that a model or a document says is ever read as HTML. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function find(id) {
  return document.getElementById(id);
}
