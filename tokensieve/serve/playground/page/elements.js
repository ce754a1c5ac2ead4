/** A new element. Strings become text nodes, so text from a model or a document is never parsed as HTML. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** A button that copies a text. name: what a screen reader calls it. text: a function that returns the text. */
export function copyButton(name, text) {
  const button = element("button", { type: "button", className: "quiet", ariaLabel: name }, "Copy");
  button.addEventListener("click", async () => {
    button.textContent = (await copy(text())) ? "Copied" : "Not allowed";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  return button;
}

/** Whether the browser let it. Without TLS, only localhost has a clipboard; elsewhere a selection is copied. */
async function copy(text) {
  try {
    if (navigator.clipboard) return await navigator.clipboard.writeText(text).then(() => true);
  } catch (error) {
    if (error.name === "NotAllowedError") return false;
    throw error;
  }
  const { activeElement: focused } = document;
  const held = element("textarea", { className: "unseen", value: text });
  document.body.append(held);
  held.select();
  const copied = document.execCommand("copy");
  held.remove();
  focused.focus();
  return copied;
}

export function find(id) {
  return document.getElementById(id);
}
