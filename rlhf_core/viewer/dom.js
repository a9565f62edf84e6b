// Building the page. Every text becomes a text node: what a model wrote is never read as markup.

const SVG = "http://www.w3.org/2000/svg";

function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

// of a chat, whose last message of the user stands above
function wholePrompt(text) {
  return el("details", { class: "whole" }, el("summary", {}, "The whole prompt, as the policy reads it"), text);
}

function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

function byId(id) {
  return document.getElementById(id);
}

// Characters that hide, or that turn others around, as something to see: NUL as ␀, a bidi override as ⟨U+202E⟩.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u115f\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

function visible(text) {
  return text.replace(HIDDEN, (character) => {
    const code = character.charCodeAt(0);
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    return `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}

// The beginning of a text, on one line.
function oneLine(text, length = 160) {
  return visible(text.slice(0, length)).replace(/\s*\n\s*/g, " ↵ ").replaceAll("\t", " ").trim();
}

// A token as it is read out and listed: its spaces and line ends can be seen.
function tokenName(text) {
  return visible(text).replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

async function copy(text, button) {
  let isCopied = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    isCopied = copyBySelecting(text); // a page from a file, or inside a frame, may not use the clipboard
  }
  say(isCopied ? "Copied" : "This browser does not let the page copy");
  const before = button.textContent;
  button.textContent = isCopied ? "Copied" : "Not copied";
  setTimeout(() => { button.textContent = before; }, 1200);
}

function copyBySelecting(text) {
  const area = el("textarea", { class: "unseen", "aria-hidden": "true", tabindex: "-1" });
  const focused = document.activeElement;
  area.value = text;
  document.body.append(area);
  area.select();
  const isCopied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return isCopied;
}

// Tell a screen reader.
function say(text) {
  byId("live").textContent = text;
}

const tip = {
  // Show rows of [name, value] beside a rectangle of the window.
  show(title, rows, rectangle) {
    const box = byId("tip");
    box.replaceChildren(
      el("p", { class: "tip-title" }, title),
      el("dl", {}, rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
    );
    box.hidden = false;
    const { width, height } = box.getBoundingClientRect();
    const left = Math.max(8, Math.min(rectangle.left, document.documentElement.clientWidth - width - 8));
    const isBelow = rectangle.bottom + 8 + height < window.innerHeight;
    box.style.left = `${left}px`;
    box.style.top = `${isBelow ? rectangle.bottom + 8 : Math.max(8, rectangle.top - 8 - height)}px`;
  },
  hide() {
    byId("tip").hidden = true;
  },
};
