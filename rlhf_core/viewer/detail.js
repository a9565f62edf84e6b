// One sample: its prompt, its response token by token in colours, its numbers, and who else answers its prompt.

class Detail {
  // open: called with the row of another sample that is to be shown; move: with 1 or -1, for the next or previous one.
  constructor(data, { open, move }) {
    this.data = data;
    this.open = open;
    this.move = move;
    this.measure = "kl";
    this.row = null;
    this.host = byId("detail");
    this.scales = new Map();
  }

  show(row) {
    const hadTokenFocus = Boolean(document.activeElement?.closest("#tokens"));
    this.row = row;
    tip.hide();
    const parts = [this.heading(), this.facts(), ...this.prompt(), this.response(), this.tokenTable(), this.others(), this.command()];
    this.host.replaceChildren(...parts.filter(Boolean));
    this.host.scrollTop = 0;
    this.colour();
    if (hadTokenFocus) byId("tokens").querySelector('[tabindex="0"]')?.focus();
  }

  // what a chat asks stands first, the whole prompt is one step away
  prompt() {
    const [asked, whole] = [this.data.asked(this.row), this.data.prompt(this.row)];
    if (!asked) return [this.text("Prompt", whole)];
    return [this.text("Asked", asked), wholePrompt(this.text("Prompt", whole))];
  }

  heading() {
    const id = this.data.ids[this.row];
    const button = el("button", { type: "button", class: "quiet", onclick: () => copy(id, button) }, "Copy id");
    return el("header", { class: "detail-head" },
      el("h3", { id: "detail-title", tabindex: "-1" }, visible(id)), button,
      el("span", { class: "push" }),
      el("button", { type: "button", class: "quiet", "aria-label": "Previous sample", title: "k", onclick: () => this.move(-1) }, "↑"),
      el("button", { type: "button", class: "quiet", "aria-label": "Next sample", title: "j", onclick: () => this.move(1) }, "↓"));
  }

  facts() {
    const { data, row } = this;
    const of = (name, digits) => fixed(data.numbers[name][row], digits);
    const components = Object.entries(data.components);
    const facts = [
      ["iteration", of("iteration", 0)], ["score", of("score", 3)], ["shaped", of("score_shaped", 3)], ["KL", of("kl", 3)], ["k3", of("k3", 3)],
      ["R(x, y)", of("rlhf_reward", 3)], ["max |A|", of("max_abs_advantage", 3)], ["tokens", of("length", 0)], ["end", visible(data.finishReason(row))],
      ...(components.length > 1 ? components.map(([name, values]) => [visible(name), fixed(values[row], 3)]) : []),
    ];
    return el("dl", { class: "facts" }, facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
  }

  text(title, text) {
    return el("section", {}, el("h4", {}, title), el("p", { class: "text", dir: "auto" }, visible(text)));
  }

  response() {
    const { data } = this;
    const choices = Object.entries(MEASURES).filter(([name]) => hasMeasure(data, name)).map(([name, { label }]) => {
      const input = el("input", { type: "radio", name: "measure", value: name, onchange: () => { this.measure = name; this.colour(); } });
      input.checked = name === this.measure;
      return el("label", {}, input, el("span", {}, label));
    });
    this.legend = el("div", { class: "legend" });
    this.says = el("p", { class: "says" });
    const texts = data.tokenTexts(this.row);
    this.columns = TOKEN_COLUMNS.map(([name, label]) => [label, valuesOf(data, this.row, name)]).filter(([, values]) => values);
    const tokens = texts.map((text, t) => el("span", {
      role: "option", class: "token", tabindex: t === 0 ? "0" : "-1", "data-t": t, "aria-selected": "false", "aria-label": this.named(text, t),
    }, visible(text) || "∅"));
    const box = el("div", { id: "tokens", class: "tokens", dir: "auto", role: "listbox", "aria-label": "Tokens of the response: left and right arrow keys" }, tokens);
    box.addEventListener("pointerover", (event) => this.reveal(event.target.closest(".token")));
    box.addEventListener("pointerleave", () => this.reveal(document.activeElement?.closest?.(".token")));
    box.addEventListener("focusin", (event) => this.focused(event.target.closest(".token")));
    box.addEventListener("focusout", () => tip.hide());
    box.addEventListener("click", (event) => event.target.closest(".token")?.focus());
    box.addEventListener("keydown", (event) => this.key(event));
    return el("section", {},
      el("div", { class: "response-head" }, el("h4", {}, "Response"), this.legend),
      el("fieldset", { class: "switch" }, el("legend", {}, "Colour tokens by"), choices),
      box, this.says);
  }

  named(text, t) {
    return `token ${t + 1}, ${tokenName(text)}: ${this.columns.map(([label, values]) => `${label} ${fixed(values[t])}`).join(", ")}`;
  }

  // Colour the tokens by the chosen measure.
  colour() {
    const { data, measure } = this;
    if (!this.scales.has(measure)) this.scales.set(measure, scaleOf(data, measure));
    const scale = this.scales.get(measure);
    const values = valuesOf(data, this.row, measure);
    byId("tokens").querySelectorAll(".token").forEach((token, t) => {
      const strength = shade(values[t], scale);
      token.classList.toggle("below", strength < 0);
      token.style.setProperty("--strength", `${Math.round(Math.abs(strength) * 100)}%`);
    });
    const { label, unit, says, isCentred } = MEASURES[measure];
    const [low, centre, high] = legendLabels(scale);
    this.says.textContent = `${label}${unit ? `, ${unit}` : ""}: ${says}${isCentred ? `, which is ${centre}` : ""}.`;
    this.legend.classList.toggle("one-sided", Boolean(MEASURES[measure].isPositive));
    this.legend.replaceChildren(el("span", {}, low), el("span", { class: "ramp", role: "img", "aria-label": `Colours from ${low} over ${centre || "half"} to ${high} or more` }), el("span", {}, high));
  }

  focused(token) {
    if (!token) return;
    const box = byId("tokens");
    box.querySelectorAll('.token[tabindex="0"]').forEach((other) => { other.tabIndex = -1; other.setAttribute("aria-selected", "false"); });
    token.tabIndex = 0;
    token.setAttribute("aria-selected", "true");
    this.reveal(token);
  }

  // Show a token's numbers beside it.
  reveal(token) {
    if (!token) return tip.hide();
    const t = Number(token.dataset.t);
    const text = this.data.tokenTexts(this.row)[t];
    return tip.show(`${t + 1}  ${tokenName(text)}`, this.columns.map(([label, values]) => [label, fixed(values[t], 4)]), token.getClientRects()[0] ?? token.getBoundingClientRect());
  }

  // After a scroll: the numbers of the token that has the focus stay beside it, any others go.
  follow() {
    this.reveal(document.activeElement?.closest(".token"));
  }

  key(event) {
    const token = event.target.closest(".token");
    const all = byId("tokens").children;
    const at = Number(token?.dataset.t ?? 0);
    const moves = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 };
    if (event.key === "Escape") tip.hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    all[Math.max(0, Math.min(all.length - 1, moves[event.key]))].focus();
  }

  // The same numbers as a table, made when it is opened.
  tokenTable() {
    const box = el("details", { class: "token-table" }, el("summary", {}, "Tokens as a table"));
    box.addEventListener("toggle", () => {
      if (!box.open || box.querySelector("table")) return;
      const texts = this.data.tokenTexts(this.row);
      box.append(el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Tokens as a table" },
        el("table", { class: "plain" },
          el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "#"), el("th", { scope: "col", class: "left" }, "token"), this.columns.map(([label]) => el("th", { scope: "col" }, label)))),
          el("tbody", {}, texts.map((text, t) => el("tr", {}, el("td", {}, t + 1), el("th", { scope: "row", class: "left" }, tokenName(text)), this.columns.map(([, values]) => el("td", {}, fixed(values[t], 4)))))))));
    });
    return box;
  }

  // Responses to the same prompt, in this and the other iterations of the page.
  others() {
    const { data, row } = this;
    const others = data.samePrompt(row);
    if (!others.length) return null;
    const shown = [...others, row].sort((a, b) => a - b).slice(0, 24);
    return el("section", {},
      el("h4", {}, `The same prompt: ${counted(others.length, "other response")}`),
      el("div", { class: "others" }, shown.map((other) => el("button", {
        type: "button", class: "other", "aria-current": other === row ? "true" : null, onclick: () => this.open(other),
      },
        el("span", { class: "other-head" }, `iteration ${data.iteration(other)} · score ${fixed(data.numbers.score[other], 2)} · KL ${fixed(data.numbers.kl[other], 2)}`),
        el("span", { class: "text", dir: "auto" }, visible(data.responses[other].slice(0, 600)))))));
  }

  command() {
    const line = `rlhf inspect ${this.data.run.quoted_path} --sample ${this.data.ids[this.row]}`;
    const button = el("button", { type: "button", class: "quiet", onclick: () => copy(line, button) }, "Copy");
    return el("section", { class: "command" }, el("h4", {}, "In the terminal"), el("code", {}, visible(line)), button);
  }
}
