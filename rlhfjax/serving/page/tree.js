// A conversation with branches: each message knows what it answers, and which of the answers to it is shown.

let count = 0;

export function message(role, content, parent = null) {
  const made = { id: ++count, role, content, parent, children: [], shown: 0, tokens: [], model: "", note: "", vote: "" };
  if (parent) {
    parent.children.push(made);
    parent.shown = parent.children.length - 1;
  }
  return made;
}

export const root = () => message("root", "");

// The messages that are shown, first to last.
export function path(from) {
  const found = [];
  for (let at = from; at.children.length; ) {
    at = at.children[Math.min(at.shown, at.children.length - 1)];
    found.push(at);
  }
  return found;
}

// What a model is given to answer a message: all before it, and it.
export function until(last, system) {
  const found = [];
  for (let at = last; at && at.role !== "root"; at = at.parent) found.unshift({ role: at.role, content: at.content });
  return system.trim() ? [{ role: "system", content: system }, ...found] : found;
}

export function remove(node) {
  const kept = node.parent.children.filter((one) => one !== node);
  node.parent.children = kept;
  node.parent.shown = Math.max(kept.length - 1, 0);
}

// Letters that reorder or hide others are shown by their number. No text is ever read as HTML.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/gu;

export function visible(text) {
  return text.replace(HIDDEN, (letter) => `⟨U+${letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}
