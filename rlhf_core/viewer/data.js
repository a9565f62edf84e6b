// What the page was given, decoded: samples and tokens as columns. Nothing here touches the page.

// The numbers of a column: float32 or uint32, as their little-endian bytes.
function decodeColumn(column) {
  const text = atob(column.base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
  return column.type === "f4" ? new Float32Array(bytes.buffer) : new Uint32Array(bytes.buffer);
}

class RunData {
  constructor(given) {
    this.run = given.run;
    this.curves = given.curves;
    this.evaluation = given.evaluation;
    this.beforeAfter = given.before_after;
    this.prompts = given.prompts;
    this.askedTexts = given.asked;
    this.finishReasons = given.finish_reasons;
    this.vocabulary = given.vocabulary;
    this.ids = given.samples.id;
    this.responses = given.samples.response;
    this.numbers = decodeAll(given.samples.numbers);
    this.components = decodeAll(given.samples.components);
    this.size = this.ids.length;
    this.rowOf = new Map(this.ids.map((id, row) => [id, row]));
    this.givenTokens = given.tokens;
    this.decodedTokens = new Map();
    this.starts = new Uint32Array(this.size + 1);
    for (let row = 0; row < this.size; row += 1) this.starts[row + 1] = this.starts[row] + this.numbers.length[row];
  }

  iteration(row) {
    return this.numbers.iteration[row];
  }

  prompt(row) {
    return this.prompts[this.numbers.prompt[row]];
  }

  // of a chat, the last message of the user; of a plain text, null
  asked(row) {
    return this.askedTexts[this.numbers.prompt[row]];
  }

  finishReason(row) {
    return this.finishReasons[this.numbers.finish_reason[row]];
  }

  hasTokens(name) {
    return Boolean(this.givenTokens[name]);
  }

  // All tokens' values of a column, one sample after another; decoded when they are first asked for.
  tokens(name) {
    if (!this.decodedTokens.has(name)) {
      this.decodedTokens.set(name, this.hasTokens(name) ? decodeColumn(this.givenTokens[name]) : null);
    }
    return this.decodedTokens.get(name);
  }

  // One sample's values of a column.
  tokensOf(row, name) {
    return this.tokens(name)?.subarray(this.starts[row], this.starts[row + 1]) ?? null;
  }

  tokenTexts(row) {
    return Array.from(this.tokensOf(row, "token"), (index) => this.vocabulary[index]);
  }

  // Other samples that answer the same prompt, in order.
  samePrompt(row) {
    const prompt = this.numbers.prompt[row];
    const found = [];
    for (let other = 0; other < this.size; other += 1) {
      if (other !== row && this.numbers.prompt[other] === prompt) found.push(other);
    }
    return found;
  }

  // What a search looks through, made when it is first needed.
  searched(row) {
    this.lowered ??= this.ids.map((id, i) => `${id}\n${this.prompt(i)}\n${this.responses[i]}`.toLowerCase());
    return this.lowered[row];
  }
}

function decodeAll(columns) {
  return Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, decodeColumn(column)]));
}

const EVERYTHING = { text: "", iteration: null, finishReason: null, ranges: {} };

// Rows that pass a filter: { text, iteration, finishReason, ranges: { score: [low, high], … } }; null means no bound.
function filterRows(data, { text, iteration, finishReason, ranges } = EVERYTHING) {
  const wanted = text.trim().toLowerCase();
  const bounds = Object.entries(ranges).filter(([, [low, high]]) => low !== null || high !== null);
  const found = [];
  for (let row = 0; row < data.size; row += 1) {
    const passes =
      (iteration === null || data.iteration(row) === iteration) &&
      (finishReason === null || data.finishReason(row) === finishReason) &&
      bounds.every(([name, [low, high]]) => {
        const value = data.numbers[name][row];
        return (low === null || value >= low) && (high === null || value <= high);
      }) &&
      (wanted === "" || data.searched(row).includes(wanted));
    if (passes) found.push(row);
  }
  return found;
}

// Rows in the order of a column; equal ones stay in the order of the run.
function sortRows(data, rows, name, isDescending) {
  const sign = isDescending ? -1 : 1;
  const column = data.numbers[name];
  const rank = name === "finish_reason" ? rankOf(data.finishReasons) : null;
  const key = rank ? (row) => rank[column[row]] : (row) => column[row];
  return [...rows].sort((a, b) => sign * (key(a) - key(b)) || a - b);
}

function rankOf(texts) {
  const sorted = [...texts].sort();
  return texts.map((text) => sorted.indexOf(text));
}
