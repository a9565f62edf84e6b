// One chart: axes, layers of lines and dots, and a cursor that finds the nearest spot by pointer or arrow keys.

const MARGIN = { top: 18, right: 14, bottom: 34, left: 46 };
const CHART_HEIGHT = 190;

class Chart {
  // spec: title, xLabel, yLabel, xDomain, yDomain, isWholeX, layers(plot) -> SVG nodes,
  //       spots: [{ x, y, title, rows }], nearest: "x" or "xy", summary, and shared: told of the spot under the cursor
  constructor(host, spec) {
    this.spec = spec;
    this.host = host;
    this.at = null;
    this.frame = el("div", {
      class: "plot", tabindex: spec.spots.length ? "0" : null, role: "img", "aria-label": `${spec.title}. ${spec.summary}`,
    });
    host.append(this.frame);
    this.frame.addEventListener("pointermove", (event) => this.point(event));
    this.frame.addEventListener("pointerleave", () => this.leave());
    this.frame.addEventListener("keydown", (event) => this.key(event));
    this.frame.addEventListener("blur", () => this.leave());
    new ResizeObserver(() => this.draw()).observe(this.frame);
    this.draw();
  }

  draw() {
    const width = Math.floor(this.frame.clientWidth);
    if (width < 80 || width === this.width) return;
    this.width = width;
    const { spec } = this;
    const right = width - MARGIN.right;
    const bottom = CHART_HEIGHT - MARGIN.bottom;
    const [x0, x1] = spec.xDomain;
    const [y0, y1] = spec.yDomain;
    this.x = (value) => MARGIN.left + ((value - x0) / (x1 - x0 || 1)) * (right - MARGIN.left);
    this.y = (value) => bottom - ((value - y0) / (y1 - y0 || 1)) * (bottom - MARGIN.top);
    const xTicks = ticks(x0, x1, Math.max(2, width / 55)).filter((v) => !spec.isWholeX || Number.isInteger(v));
    const yTicks = ticks(y0, y1, 4);
    this.cursor = svg("g", { class: "cursor", visibility: "hidden" },
      svg("line", { y1: MARGIN.top, y2: bottom }), svg("circle", { r: 4 }));
    this.frame.replaceChildren(svg("svg", { width, height: CHART_HEIGHT, "aria-hidden": "true" },
      yTicks.map((v) => svg("line", { class: "rule", x1: MARGIN.left, x2: right, y1: this.y(v), y2: this.y(v) })),
      yTicks.map((v) => svg("text", { class: "tick", x: MARGIN.left - 7, y: this.y(v) + 4, "text-anchor": "end" }, tickLabel(v, yTicks))),
      xTicks.map((v) => svg("text", { class: "tick", x: this.x(v), y: bottom + 16, "text-anchor": "middle" }, tickLabel(v, xTicks))),
      svg("line", { class: "axis", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom }),
      svg("text", { class: "label", x: right, y: CHART_HEIGHT - 3, "text-anchor": "end" }, spec.xLabel),
      spec.layers(this),
      this.cursor));
  }

  line(points, kind) {
    const path = points.map(([x, y]) => `${this.x(x).toFixed(1)},${this.y(y).toFixed(1)}`).join(" ");
    return svg("polyline", { class: `line ${kind}`, points: path });
  }

  // A horizontal line with its name, at the left, where a run begins.
  level(value, name) {
    const [left, right] = this.spec.xDomain;
    return [
      this.line([[left, value], [right, value]], "target"),
      svg("text", { class: "target-name", x: this.x(left) + 5, y: this.y(value) - 5 }, name),
    ];
  }

  dot([x, y], kind, radius = 3.5) {
    return svg("circle", { class: `dot ${kind}`, cx: this.x(x), cy: this.y(y), r: radius });
  }

  square([x, y], kind) {
    return svg("rect", { class: `dot ${kind}`, x: this.x(x) - 4, y: this.y(y) - 4, width: 8, height: 8 });
  }

  diamond([x, y], kind) {
    const [cx, cy] = [this.x(x), this.y(y)];
    return svg("polygon", { class: `dot ${kind}`, points: `${cx},${cy - 5} ${cx + 5},${cy} ${cx},${cy + 5} ${cx - 5},${cy}` });
  }

  // An interval in each direction.
  cross(kl, score, kind) {
    return [
      svg("line", { class: kind, x1: this.x(kl.low), x2: this.x(kl.high), y1: this.y(score.mean), y2: this.y(score.mean) }),
      svg("line", { class: kind, x1: this.x(kl.mean), x2: this.x(kl.mean), y1: this.y(score.low), y2: this.y(score.high) }),
    ];
  }

  point(event) {
    const box = this.frame.getBoundingClientRect();
    const [px, py] = [event.clientX - box.left, event.clientY - box.top];
    const distance = (spot) => {
      const dx = this.x(spot.x) - px;
      return this.spec.nearest === "x" ? Math.abs(dx) : Math.hypot(dx, this.y(spot.y) - py);
    };
    let best = null;
    this.spec.spots.forEach((spot, i) => {
      if (best === null || distance(spot) < distance(this.spec.spots[best])) best = i;
    });
    const isFar = best === null || (this.spec.nearest === "xy" && distance(this.spec.spots[best]) > 30);
    if (isFar) this.leave();
    else this.show(best);
  }

  key(event) {
    const last = this.spec.spots.length - 1;
    const moves = { ArrowRight: (i) => i + 1, ArrowLeft: (i) => i - 1, Home: () => 0, End: () => last };
    if (event.key === "Escape") this.leave();
    if (!(event.key in moves) || last < 0) return;
    event.preventDefault();
    const next = this.at === null && event.key !== "End" ? 0 : moves[event.key](this.at ?? 0);
    this.show(Math.max(0, Math.min(last, next)));
    const { title, rows } = this.spec.spots[this.at];
    say(`${title}: ${rows.map(([name, value]) => `${name} ${value}`).join(", ")}`);
  }

  show(i) {
    const spot = this.spec.spots[i];
    this.at = i;
    this.mark(spot);
    this.spec.shared?.(spot);
    const box = this.frame.getBoundingClientRect();
    const [left, top] = [box.left + this.x(spot.x), box.top + this.y(spot.y)];
    tip.show(spot.title, spot.rows, { left: left + 12, top, bottom: top });
  }

  // Put the cursor on a spot, or take it away.
  mark(spot) {
    if (!this.cursor) return;
    this.cursor.setAttribute("visibility", spot ? "visible" : "hidden");
    if (!spot) return;
    const [line, circle] = this.cursor.children;
    for (const name of ["x1", "x2"]) line.setAttribute(name, this.x(spot.x));
    circle.setAttribute("cx", this.x(spot.x));
    circle.setAttribute("cy", this.y(spot.y));
  }

  leave() {
    this.at = null;
    this.mark(null);
    this.spec.shared?.(null);
    tip.hide();
  }
}

function chartBox(title, note, keys = []) {
  return el("figure", { class: "chart" },
    el("figcaption", {},
      el("span", { class: "chart-title" }, title), el("span", { class: "chart-note" }, note),
      keys.length ? el("span", { class: "keys" }, keys.map(([kind, text]) => el("span", { class: `key ${kind}` }, text))) : null));
}
