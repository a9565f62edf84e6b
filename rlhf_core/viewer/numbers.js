// Numbers: how they are written, where the ticks of an axis stand, and how many values lie below one.

const MINUS = "\u2212";

function fixed(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  const isPlain = size === 0 || (size >= 0.5 * 10 ** -digits && size < 1e5);
  return (isPlain ? value.toFixed(digits) : value.toExponential(1)).replaceAll("-", MINUS);
}

function counted(number, noun) {
  return `${number.toLocaleString("en-US")} ${noun}${number === 1 ? "" : "s"}`;
}

// Round values between low and high, at most about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low || 1) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(i * step);
  return found;
}

// As many digits as tell two ticks apart.
function tickLabel(value, all) {
  const step = all.length > 1 ? all[1] - all[0] : Math.abs(value) || 1;
  return fixed(value, Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
}

// The value below which a share of all values lies.
function quantile(values, share) {
  if (values.length === 0) return 0;
  const sorted = Float32Array.from(values).sort();
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

// The values with some room around them, and never nothing between them.
function padded(values, { include = [], room = 0.06 } = {}) {
  const all = [...values, ...include].filter(Number.isFinite);
  if (all.length === 0) return [0, 1];
  const low = Math.min(...all);
  const high = Math.max(...all);
  const around = (high - low || Math.abs(high) || 1) * room;
  return [low === 0 ? 0 : low - around, high + around];
}
