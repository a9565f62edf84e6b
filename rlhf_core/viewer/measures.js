// What a token can be coloured by, and how strongly: blue below a centre, orange above it.

const NATS = "nats";
const TOKEN_COLUMNS = [
  ["logprob", "log π"],
  ["ref_logprob", "log π_ref"],
  ["kl", "KL"],
  ["ratio", "π / π_ref"],
  ["reward", "reward"],
  ["value", "value"],
  ["advantage", "advantage"],
  ["return", "return"],
  ["entropy", "entropy"],
];

const MEASURES = {
  kl: {
    label: "KL",
    unit: NATS,
    says: "log π − log π_ref of this token: orange where the policy finds it likelier than the reference does, blue where less likely",
  },
  advantage: {
    label: "Advantage",
    unit: "",
    says: "orange tokens are made likelier by the update, blue ones less likely",
  },
  reward: {
    label: "Reward",
    unit: "",
    says: "the shaped reward of each token: its share of −β · KL, and the score at the end",
  },
  ratio: {
    label: "Ratio",
    unit: "×",
    says: "π / π_ref of this token, on a logarithmic scale: orange above 1, blue below",
    isLogarithmic: true,
  },
  value: {
    label: "Value",
    unit: "",
    says: "what the critic expected before the token: blue below, orange above the median of this page",
    isCentred: true,
  },
  entropy: {
    label: "Entropy",
    unit: NATS,
    says: "of the policy at this token: the stronger, the less certain it was",
    isPositive: true,
  },
};

const MAX_LOG_RATIO = 20; // a ratio is shown as e^20 at most, as the run computes it

function hasMeasure(data, name) {
  return name === "ratio" ? true : data.hasTokens(name);
}

function ratios(klColumn) {
  return Float32Array.from(klColumn, (kl) => Math.exp(Math.max(-MAX_LOG_RATIO, Math.min(MAX_LOG_RATIO, kl))));
}

// A sample's values of a column or of the ratio, which is exp(logprob - ref_logprob).
function valuesOf(data, row, name) {
  if (name !== "ratio") return data.tokensOf(row, name);
  const logprobs = data.tokensOf(row, "logprob");
  return ratios(data.tokensOf(row, "ref_logprob").map((reference, t) => logprobs[t] - reference));
}

// Centre and reach of a measure's colours, from all tokens of the page, so that samples compare.
function scaleOf(data, name) {
  const measure = MEASURES[name];
  const values = data.tokens(name === "ratio" ? "kl" : name);
  const centre = measure.isCentred ? quantile(values, 0.5) : 0;
  const reach = quantile(values.map((value) => Math.abs(value - centre)), 0.98);
  return { centre, reach: reach || 1, measure };
}

// How strongly a value is coloured: from -1, the strongest blue, to 1, the strongest orange.
function shade(value, { centre, reach, measure }) {
  const plain = measure.isLogarithmic ? Math.log(value) : value;
  return Math.max(-1, Math.min(1, (plain - centre) / reach));
}

// The three labels under the legend.
function legendLabels({ centre, reach, measure }) {
  const plain = [centre - reach, centre, centre + reach];
  const values = measure.isLogarithmic ? plain.map(Math.exp) : plain;
  const digits = measure.isLogarithmic || reach >= 10 ? 1 : 2;
  const labels = values.map((value) => fixed(value, digits) + (measure.isLogarithmic ? "×" : ""));
  return measure.isPositive ? ["0", "", labels[2]] : labels;
}
