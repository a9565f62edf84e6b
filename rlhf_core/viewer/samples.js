// The table of samples: only the rows in sight exist. Sorted by its headings, narrowed by its filters.

const ROW_HEIGHT = 34; // as in page.css
const SPARE_ROWS = 10; // above and below what is in sight

const COLUMNS = [
  { name: "iteration", label: "Iter.", digits: 0, says: "iteration" },
  { name: "text", label: "Prompt, then response", isText: true },
  { name: "score", label: "Score", digits: 2, says: "raw score of the reward model" },
  { name: "kl", label: "KL", digits: 2, says: "k1 to the reference, summed over the response; nats" },
  { name: "k3", label: "k3", digits: 2, says: "k3 to the reference, summed over the response; nats" },
  { name: "length", label: "Len", digits: 0, says: "tokens of the response" },
  { name: "rlhf_reward", label: "R(x, y)", digits: 2, says: "RLHF reward: shaped score − β · KL" },
  { name: "max_abs_advantage", label: "max |A|", digits: 2, says: "largest absolute advantage of a token" },
  { name: "finish_reason", label: "End", says: "why the response ended: eos, stop or length" },
];

class SampleTable {
  // chosen: called with the row of the sample that is to be shown.
  constructor(data, chosen) {
    this.data = data;
    this.chosen = chosen;
    this.row = null;
    this.filter = { text: "", iteration: null, finishReason: null, ranges: { score: [null, null], kl: [null, null] } };
    this.sort = { name: "iteration", isDescending: true };
    this.build();
    this.buildFilters();
    this.update();
  }

  build() {
    this.headings = COLUMNS.map((column) => {
      const title = column.says ?? null;
      const inside = column.isText
        ? column.label
        : el("button", { type: "button", title, onclick: () => this.sortBy(column.name) }, column.label, el("span", { class: "arrow", "aria-hidden": "true" }));
      return el("th", { scope: "col", role: "columnheader", class: `col-${column.name}`, "data-column": column.name }, inside);
    });
    this.body = el("tbody", {});
    this.table = el("table", { role: "grid", tabindex: "0", "aria-label": "Samples: arrow keys choose one", "aria-colcount": COLUMNS.length },
      el("thead", {}, el("tr", { role: "row", "aria-rowindex": "1" }, this.headings)), this.body);
    this.view = byId("grid");
    this.view.replaceChildren(this.table);
    this.view.addEventListener("scroll", () => this.renderSoon());
    new ResizeObserver(() => this.renderSoon()).observe(this.view);
    this.table.addEventListener("keydown", (event) => this.key(event));
    this.body.addEventListener("click", (event) => {
      const found = event.target.closest("tr[data-row]");
      if (found) this.choose(Number(found.dataset.row));
    });
  }

  buildFilters() {
    const { data, filter } = this;
    const search = byId("search");
    search.addEventListener("input", () => { filter.text = search.value; this.update(); });
    const iteration = byId("iteration");
    iteration.append(...data.run.shown.map((number) => el("option", { value: number }, number)));
    iteration.addEventListener("change", () => { filter.iteration = iteration.value === "" ? null : Number(iteration.value); this.update(); });
    const reason = byId("finish-reason");
    reason.append(...[...data.finishReasons].sort().map((name) => el("option", { value: name }, visible(name))));
    reason.addEventListener("change", () => { filter.finishReason = reason.value === "" ? null : reason.value; this.update(); });
    for (const name of Object.keys(filter.ranges)) {
      ["low", "high"].forEach((side, i) => {
        const input = byId(`${name}-${side}`);
        input.addEventListener("input", () => {
          filter.ranges[name][i] = input.value.trim() === "" || Number.isNaN(input.valueAsNumber) ? null : input.valueAsNumber;
          this.update();
        });
      });
    }
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("filters").addEventListener("reset", () => setTimeout(() => {
      Object.assign(filter, { text: "", iteration: null, finishReason: null });
      for (const name of Object.keys(filter.ranges)) filter.ranges[name] = [null, null];
      this.update();
    }));
  }

  // Show one iteration only.
  only(iteration) {
    byId("iteration").value = iteration;
    this.filter.iteration = iteration;
    this.update();
  }

  sortBy(name) {
    const isNumber = !["iteration", "finish_reason"].includes(name);
    const isDescending = this.sort.name === name ? !this.sort.isDescending : isNumber;
    this.sort = { name, isDescending };
    this.update();
    say(`Sorted by ${name.replaceAll("_", " ")}, ${isDescending ? "highest" : "lowest"} first`);
  }

  update() {
    const { data, sort } = this;
    this.rows = sortRows(data, filterRows(data, this.filter), sort.name, sort.isDescending);
    this.headings.forEach((heading) => {
      const isSorted = heading.dataset.column === sort.name;
      if (isSorted) heading.setAttribute("aria-sort", sort.isDescending ? "descending" : "ascending");
      else heading.removeAttribute("aria-sort");
    });
    byId("count").textContent = this.rows.length === data.size
      ? counted(data.size, "sample")
      : `${this.rows.length.toLocaleString("en-US")} of ${counted(data.size, "sample")}`;
    this.table.setAttribute("aria-rowcount", this.rows.length + 1);
    this.view.scrollTop = 0;
    this.render();
  }

  renderSoon() {
    this.frame ??= requestAnimationFrame(() => { this.frame = null; this.render(); });
  }

  render() {
    const height = this.view.clientHeight || 600;
    const first = Math.max(0, Math.floor(this.view.scrollTop / ROW_HEIGHT) - SPARE_ROWS);
    const after = Math.min(this.rows.length, first + Math.ceil(height / ROW_HEIGHT) + 2 * SPARE_ROWS);
    const shown = this.rows.slice(first, after).map((row, i) => this.line(row, first + i));
    if (!this.rows.length) shown.push(el("tr", { class: "none" }, el("td", { colspan: COLUMNS.length }, "No sample passes these filters.")));
    this.body.replaceChildren(spacer(first), ...shown, spacer(this.rows.length - after));
    const active = this.body.querySelector('[aria-selected="true"]');
    if (active) this.table.setAttribute("aria-activedescendant", active.id);
    else this.table.removeAttribute("aria-activedescendant");
  }

  line(row, at) {
    const { data } = this;
    const isChosen = row === this.row;
    return el("tr", { id: `row-${row}`, role: "row", "data-row": row, "aria-rowindex": at + 2, "aria-selected": String(isChosen) },
      COLUMNS.map(({ name, isText, digits }) => {
        if (isText) {
          return el("td", { role: "gridcell", class: "col-text" },
            el("span", { class: "prompt" }, data.asked(row) ? oneLine(data.asked(row)) : promptEnd(data.prompt(row))), " ", el("span", { class: "response" }, oneLine(data.responses[row])));
        }
        const text = name === "finish_reason" ? visible(data.finishReason(row)) : fixed(data.numbers[name][row], digits);
        return el("td", { role: "gridcell", class: `col-${name}` }, text);
      }));
  }

  choose(row) {
    this.mark(row);
    this.chosen(row);
  }

  // Mark a sample as the chosen one, and bring it into sight.
  mark(row) {
    this.row = row;
    const at = this.rows.indexOf(row);
    if (at >= 0) {
      const head = this.table.tHead.offsetHeight;
      const top = at * ROW_HEIGHT;
      const height = this.view.clientHeight - head;
      if (top < this.view.scrollTop) this.view.scrollTop = top;
      else if (top + ROW_HEIGHT > this.view.scrollTop + height) this.view.scrollTop = top + ROW_HEIGHT - height;
    }
    this.render();
  }

  // Go on by some rows; from nowhere, to the first.
  move(by) {
    if (!this.rows.length) return;
    const at = this.rows.indexOf(this.row);
    const next = at < 0 ? 0 : Math.max(0, Math.min(this.rows.length - 1, at + by));
    this.choose(this.rows[next]);
  }

  key(event) {
    if (event.target !== this.table) return;
    const page = Math.max(1, Math.floor(this.view.clientHeight / ROW_HEIGHT) - 2);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -this.rows.length, End: this.rows.length };
    if (event.key in moves) {
      event.preventDefault();
      this.move(moves[event.key]);
    } else if (event.key === "Enter" && this.row !== null) {
      event.preventDefault();
      byId("tokens")?.querySelector('[tabindex="0"]')?.focus();
    }
  }
}

// The last words of a prompt: what the response goes on from.
function promptEnd(prompt) {
  const end = prompt.slice(-24);
  return (prompt.length > end.length ? "…" : "") + oneLine(end.length < prompt.length ? end.replace(/^\S*\s+/, "") : end);
}

function spacer(rows) {
  const cell = el("td", { colspan: COLUMNS.length });
  cell.style.height = `${rows * ROW_HEIGHT}px`;
  return el("tr", { class: "spacer", "aria-hidden": "true" }, cell);
}
