// The page: what stands where, the keys, the theme, and the sample in the address.

const data = new RunData(JSON.parse(byId("data").textContent));

function describeRun() {
  const { run } = data;
  document.title = `${visible(run.name)} · rlhf view`;
  byId("run-name").textContent = visible(run.name);
  const parts = [
    `${run.num_finished} of ${counted(run.num_iterations, "iteration")}`,
    run.num_responses === data.size
      ? `all ${counted(data.size, "response")} of ${named(run.shown)}`
      : `${counted(data.size, "response")} of the ${run.num_responses.toLocaleString("en-US")} of ${named(run.shown)}`,
    visible(run.policy),
  ];
  byId("run-facts").textContent = parts.join(" · ");
  if (run.note) byId("run-note").textContent = run.note;
  byId("run-note").hidden = !run.note;
}

// "iteration 3", "iterations 0, 20, 39", "iterations 0 to 39": runs of neighbours are drawn together.
function named(iterations) {
  const runs = [];
  for (const number of iterations) {
    if (runs.length && number === runs.at(-1)[1] + 1) runs.at(-1)[1] = number;
    else runs.push([number, number]);
  }
  const parts = runs.flatMap(([first, last]) => (first === last ? [first] : last === first + 1 ? [first, last] : [`${first} to ${last}`]));
  const few = parts.length > 8 ? [...parts.slice(0, 4), "…", ...parts.slice(-2)] : parts;
  return `iteration${iterations.length === 1 ? "" : "s"} ${few.join(", ")}`;
}

function drawBeforeAfter() {
  const rows = data.beforeAfter;
  byId("before-after").hidden = rows.length === 0;
  const side = (name, text, score) => el("div", { class: "side" },
    el("p", { class: "side-head" }, el("span", {}, name), el("span", { class: "score" }, `score ${fixed(score, 2)}`)),
    el("p", { class: "text", dir: "auto" }, visible(text.trim())));
  byId("pairs").append(...rows.map((row) => el("article", { class: "pair" },
    el("p", { class: "text prompt", dir: "auto" }, visible(row.prompt)),
    row.prompt_text ? wholePrompt(el("p", { class: "text", dir: "auto" }, visible(row.prompt_text))) : null,
    el("div", { class: "sides" }, side("Before", row.before, row.score_before), side("After", row.after, row.score_after)))));
}

// light and dark as the system has it, until the button says otherwise
const THEMES = ["auto", "light", "dark"];
function turnTheme() {
  const root = document.documentElement;
  const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "auto") + 1) % THEMES.length];
  root.dataset.theme = next;
  byId("theme").textContent = `Theme: ${next}`;
}

const table = new SampleTable(data, (row) => show(row));
const detail = new Detail(data, { open: (row) => show(row), move: (by) => table.move(by) });

function show(row) {
  if (table.row !== row) table.mark(row);
  detail.show(row);
  byId("missing").hidden = true;
  try {
    history.replaceState(null, "", `#${encodeURIComponent(data.ids[row])}`);
  } catch {
    // inside a frame without an address of its own, as in MLflow, there is nothing to link to
  }
}

// The sample that the address names; the first one where it names none.
function showAddressed() {
  let id = location.hash.slice(1);
  try {
    id = decodeURIComponent(id);
  } catch {
    // not ours: taken as it stands
  }
  const row = data.rowOf.get(id);
  byId("missing").hidden = row !== undefined || ["", "samples"].includes(id);
  byId("missing").textContent = `${visible(id.slice(0, 80))} is not among the samples of this page: it holds ${named(data.run.shown)}.`;
  if (row !== undefined) show(row);
  else if (table.rows.length && table.row === null) {
    table.mark(table.rows[0]);
    detail.show(table.rows[0]);
  }
}

function onKey(event) {
  const isTyping = event.target.closest?.("input:not([type=radio]), select, textarea");
  if (event.key === "Escape" && isTyping) return event.target.blur();
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return undefined;
  const inDetail = event.target.closest?.("#detail") && event.target.type !== "radio" && !event.target.closest(".scroll");
  const actions = {
    j: () => table.move(1),
    k: () => table.move(-1),
    "/": () => byId("search").focus(),
    "?": () => byId("help").showModal(),
    t: turnTheme,
    c: () => nextMeasure(),
    ...(inDetail ? { ArrowDown: () => table.move(1), ArrowUp: () => table.move(-1) } : {}),
  };
  if (!(event.key in actions)) return undefined;
  event.preventDefault();
  return actions[event.key]();
}

// The next choice of "colour tokens by".
function nextMeasure() {
  const inputs = [...detail.host.querySelectorAll("input[name=measure]")];
  if (!inputs.length) return;
  const at = inputs.findIndex((input) => input.checked);
  inputs[(at + 1) % inputs.length].click();
  say(`Coloured by ${MEASURES[detail.measure].label}`);
}

describeRun();
drawCurves(data, byId("charts"), (iteration) => { table.only(iteration); byId("grid").scrollIntoView({ block: "nearest" }); });
curvesTable(data, byId("curves-table"));
drawBeforeAfter();
byId("theme").addEventListener("click", turnTheme);
byId("help-button").addEventListener("click", () => byId("help").showModal());
byId("help-close").addEventListener("click", () => byId("help").close());
document.addEventListener("keydown", onKey);
window.addEventListener("hashchange", showAddressed);
document.addEventListener("scroll", () => detail.follow(), { capture: true, passive: true });
showAddressed();
document.documentElement.dataset.ready = "true";
