// The run's curves by iteration, and its score against its KL with what is attainable.

const SMOOTHING = 5; // iterations averaged on the training path, as in evaluation.png
const MAX_MARKED = 12; // iterations of the page that are marked on the curves: more are a line of their own

function drawCurves(data, host, goTo) {
  const { curves } = data;
  const shown = new Set(data.run.shown);
  const charts = [];
  // The cursor of one curve stands in all three.
  const shared = (spot) => charts.forEach((chart) => chart.mark(spot && chart.spec.spots[spot.at]));
  const rows = (at) => [
    ["score", fixed(curves.score[at])], ["KL", `${fixed(curves.kl[at], 2)} nats`], ["β", fixed(curves.beta[at], 4)],
    ["length", `${fixed(curves.length[at], 1)} tokens`], ["entropy", `${fixed(curves.entropy[at], 1)} nats`],
  ];
  for (const [name, title, unit, digits] of [
    ["score", "Score", "mean of the responses", 3], ["kl", "KL to the reference", "nats a response", 2], ["beta", "KL coefficient β", "", 4],
  ]) {
    const values = curves[name];
    const target = name === "kl" ? data.run.kl_target : null;
    const points = values.map((value, at) => [curves.iteration[at], value]);
    const box = chartBox(title, unit);
    host.append(box);
    charts.push(new Chart(box, {
      title,
      summary: `${summaryOf(values, digits)}${target === null ? "" : `, target ${target}`}. Arrow keys read the iterations.`,
      xLabel: "iteration",
      xDomain: [0, Math.max(1, curves.iteration.length - 1)],
      isWholeX: true,
      yDomain: domainOf(name, values, target),
      nearest: "x",
      shared,
      spots: points.map(([x, y], at) => ({ at, x, y, title: `iteration ${x}`, rows: rows(at) })),
      layers: (plot) => [
        ...(target === null ? [] : plot.level(target, `target ${fixed(target, 1)}`)),
        plot.line(points, "run"),
        ...points.filter(([x]) => shown.size <= MAX_MARKED && shown.has(x)).map((point) => {
          const dot = plot.dot(point, "shown");
          dot.addEventListener("click", () => goTo(point[0]));
          return dot;
        }),
      ],
    }));
  }
  const box = chartBox("Score against KL", data.evaluation ? visible(data.evaluation.name) : `one dot an iteration, mean of ${SMOOTHING}`, pathKeys(data));
  host.append(box);
  new Chart(box, pathSpec(data, rows));
}

function domainOf(name, values, target) {
  if (name === "score") return padded(values);
  const [low, high] = padded(values, { include: [0, ...(target === null ? [] : [target])] });
  return [Math.min(low, 0), high];
}

function summaryOf(values, digits) {
  return values.length ? `From ${fixed(values[0], digits)} to ${fixed(values.at(-1), digits)} over ${counted(values.length, "iteration")}` : "No iteration yet";
}

function pathKeys(data) {
  const keys = [["run-key", "training"]];
  if (!data.evaluation) return keys;
  keys.push(["attainable-key", "attainable"]);
  if (data.evaluation.best_of_n.length) keys.push(["best-key", "best-of-n"]);
  return [...keys, ["evaluated-key", "evaluated"], ["reference-key", "reference"]];
}

function pathSpec(data, rows) {
  const { curves, evaluation } = data;
  const training = curves.kl.map((kl, at) => [kl, curves.score[at]]);
  const smooth = training.slice(SMOOTHING - 1).map((_, first) => {
    const part = training.slice(first, first + SMOOTHING);
    return [0, 1].map((axis) => part.reduce((sum, point) => sum + point[axis], 0) / SMOOTHING);
  });
  const spots = training.map(([x, y], at) => ({ x, y, title: `iteration ${curves.iteration[at]}`, rows: rows(at) }));
  const marks = evaluation ? evaluationMarks(evaluation) : null;
  if (marks) spots.push(...marks.spots);
  const xs = [0, ...training.map(([x]) => x), ...(marks?.xs ?? [])];
  return {
    title: "Score against KL",
    summary: `${counted(training.length, "iteration")} of training${evaluation ? `, ${counted(evaluation.policies.length, "evaluated point")} and the attainable frontier` : ""}. Arrow keys read the points.`,
    xLabel: "KL to the reference, nats a response",
    xDomain: padded(xs, { room: 0.04 }),
    yDomain: padded([...training.map(([, y]) => y), ...(marks?.ys ?? [])]),
    nearest: "xy",
    spots,
    layers: (plot) => [
      ...(marks ? marks.lines(plot) : []),
      ...training.map((point) => plot.dot(point, "step", 2.2)),
      ...(smooth.length > 1 ? [plot.line(smooth, "run")] : []),
      ...(marks ? marks.dots(plot) : []),
    ],
  };
}

// The frontier, best-of-n, and the policies that were evaluated, as they are drawn and told.
function evaluationMarks({ frontier, reference_score: reference, best_of_n: best, policies }) {
  const points = frontier.kl.map((kl, i) => [kl, frontier.score[i]]);
  const trusted = points.filter((_, i) => frontier.trusted[i]);
  const beyond = [...trusted.slice(-1), ...points.filter((_, i) => !frontier.trusted[i])];
  const reach = Math.max(0, ...policies.map((policy) => policy.kl.high), ...trusted.map(([kl]) => kl));
  const near = beyond.filter((_, i) => i === 0 || beyond[i - 1][0] <= reach); // one point further than anything else
  const evaluated = policies.map((policy) => ({
    x: policy.kl.mean,
    y: policy.score.mean,
    title: visible(policy.name),
    rows: [
      ["score", interval(policy.score)], ["KL", `${interval(policy.kl)} nats`],
      ...(policy.share === null ? [] : [["of attainable", `${Math.round(policy.share * 100)} %`]]),
    ],
  }));
  const told = best.map(({ n, kl, score }) => ({ x: kl, y: score, title: `best of ${n}`, rows: [["score", fixed(score)], ["KL at most", `${fixed(kl, 2)} nats`]] }));
  return {
    xs: [...near.map(([kl]) => kl), ...policies.flatMap(({ kl }) => [kl.low, kl.high])],
    ys: [reference, ...trusted.map(([, score]) => score), ...near.map(([, score]) => score), ...policies.flatMap(({ score }) => [score.low, score.high])],
    spots: [...told, ...evaluated, { x: 0, y: reference, title: "reference", rows: [["score", fixed(reference)]] }],
    lines: (plot) => [
      plot.line(trusted, "attainable"),
      ...(near.length > 1 ? [plot.line(near, "beyond")] : []),
      ...blendedLines(policies, reference).map((line) => plot.line(line, "blended")),
    ],
    dots: (plot) => [
      ...best.map(({ kl, score }) => plot.diamond([kl, score], "best")),
      ...policies.flatMap((policy) => plot.cross(policy.kl, policy.score, "error")),
      ...policies.map((policy) => plot.dot([policy.kl.mean, policy.score.mean], "evaluated", 4)),
      plot.square([0, reference], "reference"),
    ],
  };
}

// From the reference over its interpolations to each policy that has any.
function blendedLines(policies, reference) {
  const lines = new Map();
  for (const policy of policies) {
    if (!lines.has(policy.base)) lines.set(policy.base, [[0, reference]]);
    lines.get(policy.base).push([policy.kl.mean, policy.score.mean]);
  }
  return [...lines.values()].filter((line) => line.length > 2);
}

function interval({ mean, low, high }) {
  return `${fixed(mean, 2)} (${fixed(low, 2)} to ${fixed(high, 2)})`;
}

// The same numbers as a table, for whom a picture is nothing.
function curvesTable(data, host) {
  const { curves } = data;
  const columns = [["iteration", 0], ["score", 3], ["kl", 3], ["beta", 4], ["length", 1], ["entropy", 2]];
  host.addEventListener("toggle", () => {
    if (!host.open || host.querySelector("table")) return;
    host.append(el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Numbers by iteration" },
      el("table", { class: "plain" },
        el("thead", {}, el("tr", {}, columns.map(([name]) => el("th", { scope: "col" }, name === "beta" ? "β" : name === "kl" ? "KL" : name)))),
        el("tbody", {}, curves.iteration.map((_, at) => el("tr", {}, columns.map(([name, digits]) => el("td", {}, fixed(curves[name][at], digits)))))))));
  });
}
