// Numbers to places on a chart, and to words.

const UNITS = bare({
  accuracy: "share",
  mfu: "share",
  memory_bytes: "bytes",
  never_fired: "share",
});

function unitOf(name) {
  const family = name.split("/")[0];
  if (/^(active|never_fired)_[xyz]$/.test(family)) return "share";
  return UNITS[family] ?? (family.endsWith("_seconds") ? "seconds" : "number");
}

/** A number in few digits: 1.234, 12.3k, 4.5e-7. */
function short(value, digits = 4) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e15 || size < 1e-3) return value.toExponential(Math.max(0, digits - 2)).replace(/\.?0+e/, "e");
  for (const [factor, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= factor * 10 || (size >= factor && factor > 1e3)) return trimmed(value / factor, digits) + letter;
  }
  return trimmed(value, digits);
}

function trimmed(value, digits) {
  const text = value.toPrecision(digits);
  return text.includes("e") ? String(Number(text)) : text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

function words(value, unit, digits = 4) {
  if (unit === "share") return `${trimmed(value * 100, digits)}%`;
  if (unit === "duration") return duration(value);
  if (unit === "bytes") return short(value, Math.min(digits, 4)).replace(/([kMGT]?)$/, " $1B");
  if (unit === "seconds") return value !== 0 && value < 0.1 ? `${trimmed(value * 1000, digits)} ms` : `${trimmed(value, digits)} s`;
  if (unit === "whole") return value.toLocaleString("en-US");
  return short(value, digits);
}

function duration(seconds) {
  const whole = Math.round(seconds);
  if (seconds < 10) return `${trimmed(seconds, 2)} s`;
  if (whole < 120) return `${whole} s`;
  if (whole < 7200) return `${Math.floor(whole / 60)} min${whole % 60 ? ` ${whole % 60} s` : ""}`;
  return `${Math.floor(whole / 3600)} h ${Math.round((whole % 3600) / 60)} min`;
}

/** Round numbers between two, about `count` of them. */
function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9 && found.length < 50; i += 1) found.push(i * step);
  return found;
}

/** Powers of ten between two numbers, with 2 and 5 times them where there are few. */
function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const every = Math.max(1, Math.ceil((last - first) / 6));
  const factors = last - first <= 2 ? [1, 2, 5] : [1];
  const found = [];
  for (let power = first; power <= last; power += every) {
    for (const factor of factors) found.push(factor * 10 ** power);
  }
  const inside = found.filter((value) => value >= low * 0.9999 && value <= high * 1.0001);
  return inside.length > 1 ? inside : ticks(low, high, 4).filter((value) => value > 0);
}

/** A function from numbers to places, and back as `.back`. */
function scale(low, high, from, to, log = false) {
  const into = log ? Math.log10 : (value) => value;
  const a = into(low), b = into(high);
  const forth = (value) => from + ((into(value) - a) / (b - a || 1)) * (to - from);
  forth.back = (place) => {
    const value = a + ((place - from) / (to - from)) * (b - a);
    return log ? 10 ** value : value;
  };
  return forth;
}
