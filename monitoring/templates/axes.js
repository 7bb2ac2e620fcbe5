// Axes of a chart: {low, high, ticks: [[value, label]], share(value), value(share)}. A share is 0 to 1.

// Return the smallest of {1, 2, 2.5, 5} * 10**n of which `intervals` are at least `span`.
const niceStep = (span, intervals) => {
  const power = 10 ** Math.floor(Math.log10(span / intervals));
  return [1, 2, 2.5, 5, 10, 20].map((m) => m * power).find((step) => span <= intervals * step * (1 + 1e-9));
};

// Return the multiples of a nice step from `low` to `high`.
const linearTicks = (low, high, intervals) => {
  const step = niceStep(high - low, intervals), ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return ticks;
};

// Return 1, 2 and 5 times the powers of ten from `low` to `high`, or only some of these powers; of a narrow range,
// multiples of a nice step.
const logTicks = (low, high, intervals) => {
  if (high < 10 * low) return linearTicks(low, high, intervals);
  const exponents = [];
  for (let e = Math.floor(Math.log10(low)); 10 ** e <= high; e++) exponents.push(e);
  const isInside = (tick) => low <= tick && tick <= high;
  const all = exponents.flatMap((e) => [1, 2, 5].map((m) => m * 10 ** e)).filter(isInside);
  if (all.length <= 2 * intervals) return all;
  const powers = exponents.map((e) => 10 ** e).filter(isInside);
  return powers.filter((_, i) => i % Math.ceil(powers.length / (intervals + 1)) === 0);
};

const makeAxis = (low, high, isLog, ticks) => {
  const scale = isLog ? Math.log10 : (value) => value;
  const from = scale(low), to = scale(high);
  return {
    low, high, ticks,
    share: (value) => (scale(value) - from) / (to - from),
    value: (share) => (isLog ? 10 ** (from + share * (to - from)) : from + share * (to - from)),
  };
};

// The y axis around values: linear ends are round numbers, and around 0 if `hasZero`.
const valueAxis = (values, isLog, hasZero) => {
  let low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
  if (isLog) {
    const room = low === high ? 2 : (high / low) ** 0.04;
    [low, high] = [low / room, high * room];
    return makeAxis(low, high, true, logTicks(low, high, 4).map((tick) => [tick, formatValue(tick)]));
  }
  if (hasZero || low === high) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
  if (low === high) high = 1;
  const step = niceStep(high - low, 4);
  [low, high] = [Math.floor(low / step + 1e-9) * step, Math.ceil(high / step - 1e-9) * step];
  return makeAxis(low, high, false, linearTicks(low, high, 4).map((tick) => [tick, formatValue(Math.abs(tick) < step / 2 ? 0 : tick)]));
};

// The x axis around totals of steps, tokens or seconds; their `unit` is what one unit of a label stands for.
const totalAxis = (totals, isLog, { unit, label }) => {
  let low = totals.reduce((a, b) => Math.min(a, b)), high = totals.reduce((a, b) => Math.max(a, b));
  if (low === high) [low, high] = isLog ? [low / 2, high * 2] : [low - 1, high + 1];
  const ticks = (isLog ? logTicks : linearTicks)(low / unit, high / unit, isLog ? 3 : 4);
  return makeAxis(low, high, isLog, ticks.map((tick) => [tick * unit, label(tick)]));
};

// How to write totals up to `high`, by the column of a row: 0 steps, 1 tokens, 2 seconds.
const totalFormat = (column, high) => {
  const plain = (value) => value.toLocaleString("en", { maximumSignificantDigits: 3 });
  if (column === 0) return { unit: 1, label: (value) => value.toLocaleString("en", { maximumFractionDigits: 1 }) };
  if (column === 1) return { unit: 1, label: (value) => value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 4 }) };
  const [unit, name] = [[3600, "h"], [60, "min"], [1, "s"]].find(([size]) => high >= 2 * size || size === 1);
  return { unit, label: (value) => `${plain(value)} ${name}` };
};
