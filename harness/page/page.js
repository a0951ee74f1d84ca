"use strict";
const { rows, methods, claims, machines } = JSON.parse(document.getElementById("data").textContent);

// ---- small helpers

const SVG = "http://www.w3.org/2000/svg";
const NONE = "–";
const unique = (values) => [...new Set(values)];
const at = (id) => document.getElementById(id);

/** An element with attributes and children; `svg:` before the name makes it one of SVG. */
function make(name, attributes = {}, ...children) {
  const element = name.startsWith("svg:") ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Three significant digits, as in the tables of LEADERBOARD.md. */
function number(value, digits = 3) {
  if (value === null || value === undefined) return NONE;
  if (value === 0 || Math.abs(value) >= 10 ** (digits - 1)) return Math.round(value).toLocaleString("en-US");
  return Math.abs(value) < 1e-4 ? value.toExponential(1) : value.toPrecision(digits);
}
const plain = (value) => value.toLocaleString("en-US", { maximumSignificantDigits: 3 });
const percent = (value) => (value === null || value === undefined ? NONE : `${number(100 * value)} %`);
/** An estimate with its interval, where it has one. */
const interval = (v, digits = 3) => (v ? v[0].toFixed(digits) + (v.length > 1 ? ` [${v[1].toFixed(digits)}, ${v[2].toFixed(digits)}]` : "") : NONE);

// ---- methods: a colour (Okabe and Ito's) and a marker each, by place in the registry; of one method, its variants

const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B58900", "#56B4E9", "#8F5BD6", "#7F7F7F"];
const MARKERS = {
  circle: "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z",
  square: "M-4.5,-4.5h9v9h-9z",
  diamond: "M0,-6.5L6.5,0L0,6.5L-6.5,0z",
  triangle: "M0,-6L5.8,5H-5.8z",
  flipped: "M0,6L5.8,-5H-5.8z",
  pentagon: "M0,-6L5.7,-1.9L3.5,4.9H-3.5L-5.7,-1.9z",
  plus: "M-6,-2h4v-4h4v4h4v4h-4v4h-4v-4h-4z",
  star: "M0,-8L2,-2.6L7.6,-2.5L3.1,1L4.7,6.5L0,3.3L-4.7,6.5L-3.1,1L-7.6,-2.5L-2,-2.6z",
  cross: "M-5,-3.5L-3.5,-5L0,-1.5L3.5,-5L5,-3.5L1.5,0L5,3.5L3.5,5L0,1.5L-3.5,5L-5,3.5L-1.5,0z",
};
const SHAPES = ["circle", "square", "diamond", "triangle", "flipped", "pentagon", "plus"];
function style(key) {
  if (key === "dense") return { colour: "var(--text)", marker: MARKERS.star };
  if (key === "null") return { colour: "var(--soft)", marker: MARKERS.cross };
  const variants = one() ? unique(rows.filter((row) => row.method === state.method).map(named)).sort() : [];
  const others = variants.filter((name) => name !== state.method);
  const i = methods.indexOf(one() ? state.method : key) + others.indexOf(key) + 1;
  return { colour: COLOURS[i % COLOURS.length], marker: MARKERS[SHAPES[i % SHAPES.length]] };
}
const target = (row) => (row.baseline || row.target === null ? null : String(row.target));
const chosen = (row) => row.baseline || state.density === "all" || target(row) === state.density;
const named = (row) => (row.options ? `${row.method} (${row.options})` : row.method);
/** Charts show one method with all its variants and controls, or all methods without controls: many variants (CROWDED)
 * then share their method's line. */
const CROWDED = 10;
const one = () => state.method !== "all";
const charted = (found) => found.filter((row) => row.baseline || (one() ? row.method === state.method : !row.control));
const crowded = (found) => !one() && unique(found.map(named)).length > CROWDED;
/** A step's time over the fastest dense step of the same run: what cells of several machines of a kind can share. */
const share = (row) => (row.method === "dense" ? (row.ms === null ? null : 1) : row.speedup ? 1 / row.speedup[0] : null);
const keyed = (row) => (one() ? named(row) : row.method);

// ---- filters, kept in the address so that a view can be linked

const FIELDS = { model: "Model", place: "Machine", mode: "Mode", batch: "Batch", context: "Context", details: "Setting" };
const state = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

/** Rows that agree with the first `depth` fields; every field falls back to the first value that is left. */
function narrowed(depth = Object.keys(FIELDS).length) {
  let left = rows;
  for (const field of Object.keys(FIELDS).slice(0, depth)) {
    const values = left.map((row) => String(row[field]));
    if (!values.includes(state[field])) state[field] = values[0];
    left = left.filter((row) => String(row[field]) === state[field]);
  }
  return left;
}

function drawFilters() {
  const form = at("filters");
  const focused = document.activeElement?.name;
  form.replaceChildren();
  Object.entries(FIELDS).forEach(([field, title], depth) => {
    const options = unique(narrowed(depth).map((row) => String(row[field])));
    narrowed(depth + 1);
    if (field === "details" && options.length < 2) return;
    const change = (event) => { state[field] = event.target.value; update(); };
    const list = options.map((value) => make("option", { value, selected: value === state[field] ? "" : null }, value));
    const wide = ["model", "place", "details"].includes(field) ? "wide" : null;
    form.append(make("label", { class: wide }, title, make("select", { name: field, change }, ...list)));
  });
  const methods = ["all", ...unique(narrowed().filter((row) => !row.baseline).map((row) => row.method)).sort()];
  if (!methods.includes(state.method)) state.method = "all";
  const pick = (event) => { state.method = event.target.value; update(); };
  const known = methods.map((value) => make("option", { value, selected: value === state.method ? "" : null }, value));
  form.append(make("label", {}, "Method in charts", make("select", { name: "method", change: pick }, ...known)));
  const densities = ["all", ...unique(narrowed(3).map(target).filter((t) => t)).sort().reverse()];
  if (!densities.includes(state.density)) state.density = "all";
  const choose = (event) => { state.density = event.target.value; update(); };
  const list = densities.map((value) => make("option", { value, selected: value === state.density ? "" : null }, value));
  form.append(make("label", {}, "Density in lines and bars", make("select", { name: "density", change: choose }, ...list)));
  const all = make("input", { type: "checkbox", name: "all", checked: state.all === "1" ? "" : null });
  all.addEventListener("change", () => { state.all = all.checked ? "1" : "0"; update(); });
  form.append(make("label", { class: "check" }, all, "table: all settings of this model and machine"));
  if (focused) form.elements[focused]?.focus();
}

// ---- charts

/** About `count` round numbers from low to high. */
function ticks(low, high, count = 5) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-6; value += step) found.push(+value.toPrecision(10));
  return found;
}
const root = (value) => Math.sign(value) * Math.sqrt(Math.abs(value));

/** An axis: `map` puts a value into pixels. kind: "linear", "root" (of a loss) or "ordinal" (values listed). */
function axis({ kind, values, listed, zero }, from, to) {
  if (kind === "ordinal") {
    const step = (to - from) / Math.max(1, listed.length);
    return { ticks: listed, map: (value) => from + step * (listed.indexOf(value) + 0.5) };
  }
  let low = Math.min(...values), high = Math.max(...values);
  if (zero) low = Math.min(0, low);
  const move = kind === "root" ? root : (value) => value;
  if (kind === "root") high = Math.max(high, 4);
  const pad = 0.08 * (move(high) - move(low) || 1);
  const start = zero && low === 0 && kind !== "root" ? 0 : move(low) - pad, end = move(high) + pad;
  const shown = kind === "root" ? [-10, -3, -1, 0, 1, 3, 10, 30, 100].filter((t) => root(t) >= start && root(t) <= end)
    : ticks(start, end).filter((t) => t >= start && t <= end);
  return { ticks: shown, map: (value) => from + ((move(value) - start) / (end - start)) * (to - from) };
}

/** The width of a column of `.charts` (page.css), so that text in a chart is as large as it says. */
function columnWidth(place) {
  const whole = place.clientWidth, gap = 16, columns = Math.max(1, Math.floor((whole + gap) / (384 + gap)));
  return Math.max(280, (whole - gap * (columns - 1)) / columns);
}

/** Scatter and lines. series: [{ key, name, points: [{ x, y, low, high, label, title }], line, dash, markers, shade }];
 * shade: between low and high, in place of a bar at every point; diagonal: where y is x. */
function chart(place, { title, x, y, series, front, budgets, unity, diagonal }) {
  const width = columnWidth(place), height = 320;
  const box = { left: 62, right: width - 18, top: 14, bottom: height - 44 };
  const points = series.flatMap((s) => s.points);
  const xs = axis({ values: points.map((p) => p.x), ...x }, box.left, box.right);
  const ends = points.flatMap((p) => [p.low ?? p.y, p.high ?? p.y]);
  const ys = axis({ values: unity ? [...ends, 1] : ends, ...y }, box.bottom, box.top);
  const svg = make("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}; the numbers are in the table below` });
  const add = (name, attributes, ...children) => svg.append(make(`svg:${name}`, attributes, ...children));
  for (const tick of ys.ticks) {
    add("line", { class: "grid", x1: box.left, x2: box.right, y1: ys.map(tick), y2: ys.map(tick) });
    add("g", { class: "tick" }, make("svg:text", { x: box.left - 6, y: ys.map(tick) + 4, "text-anchor": "end" }, plain(tick)));
  }
  let free = -Infinity;
  for (const tick of xs.ticks) {
    const text = x.kind === "ordinal" ? String(tick) : plain(tick), half = 4 * text.length;
    if (xs.map(tick) - half < free) continue;
    free = xs.map(tick) + half + 6;
    add("g", { class: "tick" }, make("svg:text", { x: xs.map(tick), y: box.bottom + 18, "text-anchor": "middle" }, text));
  }
  add("line", { class: "grid", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom });
  add("text", { x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, x.label);
  add("text", { transform: `translate(12,${(box.top + box.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, y.label);
  for (const level of unity ? [1] : budgets ?? []) {
    add("line", { class: "budget", x1: box.left, x2: box.right, y1: ys.map(level), y2: ys.map(level) });
  }
  if (diagonal) {
    const end = Math.min(...["x", "y"].map((side) => Math.max(...points.map((p) => p[side]))));
    add("line", { class: "diagonal", x1: xs.map(0), y1: ys.map(0), x2: xs.map(end), y2: ys.map(end) });
  }
  if (front) {
    const edge = best(points.filter((p) => p.counts));
    const path = edge.map((p, i) => (i ? `H${xs.map(p.x)}V${ys.map(p.y)}` : `M${xs.map(p.x)},${ys.map(p.y)}`)).join("");
    if (edge.length) add("path", { class: "front", d: `${path}H${box.right}` });
  }
  const taken = [];
  for (const s of series) {
    const { colour, marker } = style(s.key);
    const placed = s.points.map((p) => ({ ...p, px: xs.map(p.x), py: ys.map(p.y) }));
    if (s.line && placed.length > 1) {
      const d = placed.map((p, i) => `${i ? "L" : "M"}${p.px},${p.py}`).join("");
      add("path", { d, fill: "none", stroke: colour, "stroke-width": 1.6, "stroke-dasharray": s.dash });
    }
    if (s.shade) {
      const ends = [...placed.map((p) => [p.px, p.high]), ...[...placed].reverse().map((p) => [p.px, p.low])];
      add("path", { class: "shade", d: `M${ends.map(([px, y]) => `${px},${ys.map(y)}`).join("L")}Z`, fill: colour, "fill-opacity": 0.12 });
    }
    for (const p of placed) {
      if (p.low !== undefined && !s.shade) {
        add("line", { x1: p.px, x2: p.px, y1: ys.map(p.low), y2: ys.map(p.high), stroke: colour, "stroke-width": 1.4 });
      }
      if (s.markers === false) continue;
      const put = { d: marker, fill: colour, stroke: "var(--ground)", transform: `translate(${p.px},${p.py})` };
      add("path", put, make("svg:title", {}, p.title));
    }
    for (const p of placed.filter((q) => q.label)) {
      const w = 7 * p.label.length, spots = [[8, -6, "start"], [8, 14, "start"], [-8, -6, "end"], [-8, 14, "end"]];
      for (const [dx, dy, anchor] of spots) {
        const left = anchor === "start" ? p.px + dx : p.px + dx - w, area = [left, p.py + dy - 11, left + w, p.py + dy + 2];
        const hit = taken.some((t) => area[0] < t[2] && area[2] > t[0] && area[1] < t[3] && area[3] > t[1]);
        if (hit || area[0] < box.left || area[2] > width) continue;
        taken.push(area);
        add("text", { x: p.px + dx, y: p.py + dy, "text-anchor": anchor, class: "label" }, p.label);
        break;
      }
    }
  }
  place.append(make("figure", {}, make("figcaption", {}, title), svg, legend(series)));
}

/** Points that no other beats in both x and y, where less is better. */
function best(points) {
  const edge = [];
  for (const p of [...points].sort((a, b) => a.x - b.x || a.y - b.y)) {
    if (!edge.length || p.y < edge.at(-1).y) edge.push(p);
  }
  return edge;
}

function legend(series) {
  const entries = unique(series.map((s) => s.name)).sort().map((name) => {
    const { colour, marker } = style(series.find((s) => s.name === name).key);
    const icon = make("svg:svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" }, make("svg:path", { d: marker, fill: colour }));
    return make("li", {}, icon, name);
  });
  return make("ul", { class: "legend", "aria-label": "Legend" }, ...entries);
}

/** Rows as series: one per method with its options, by falling density; where they crowd, each method's front. */
function series(found, point) {
  const many = crowded(found), name = many ? (row) => row.method : named;
  return unique(found.map(name)).map((own) => {
    const [first, ...rest] = found.filter((row) => name(row) === own), points = [first, ...rest].map(point);
    const kept = many && !first.baseline ? best(points) : points;
    return { name: own, key: keyed(first), line: !first.baseline, dash: first.control ? "5 3" : null, points: kept };
  });
}

const told = (row) => `${row.label}${row.options ? ` (${row.options})` : ""}: ${number(row.mb)} MB/token, ` +
  `${number(row.ms)} ms/step, speed-up ${row.speedup ? row.speedup[0].toFixed(2) : NONE}, ` +
  `${row.loss ? `${row.loss[0].toFixed(2)} % lost` : "accuracy unknown"}`;
const empty = (place, text) => place.replaceChildren(make("p", { class: "note" }, text));

function drawPareto(all) {
  const place = at("pareto"), found = charted(all);
  place.replaceChildren();
  const lost = (row) => (row.method === "dense" ? 0 : row.loss ? row.loss[0] : null);
  const timed = !found.some((row) => row.cpu), step = "decode step ÷ fastest dense";
  const panel = (title, label, value) => {
    const shown = found.filter((row) => lost(row) !== null && value(row) !== null);
    if (!shown.some((row) => !row.baseline)) return;
    const point = (row) => ({ x: value(row), y: lost(row), label: target(row), title: told(row), counts: row.method !== "null" && !row.control });
    chart(place, {
      title, front: true, budgets: [1, 3], series: series(shown, point),
      x: { kind: "linear", label }, y: { kind: "root", label: "accuracy lost, %", zero: true },
    });
  };
  panel("Accuracy lost against bytes", "MB read per decoded token", (row) => row.mb);
  if (timed) panel("Accuracy lost against latency", step, share);
  const cells = found.filter((row) => row.read && share(row) !== null);
  if (timed && cells.length) {
    const point = (row) => ({ x: row.read, y: share(row), label: target(row), title: told(row) });
    chart(place, {
      title: "Latency against bytes", series: series(cells, point), unity: true, diagonal: true,
      x: { kind: "linear", label: "bytes read per step ÷ dense", zero: true }, y: { kind: "linear", label: step, zero: true },
    });
  }
  if (!place.children.length) empty(place, "Nothing to draw for this choice.");
  else if (!found.some((row) => row.loss)) place.append(make("p", { class: "note" }, "Random weights: there is no accuracy."));
}

function drawGrid() {
  const place = at("grid");
  place.replaceChildren();
  const alike = charted(narrowed(3)).filter((row) => row.details === state.details && row.speedup && !row.cpu && chosen(row));
  for (const [field, other] of [["batch", "context"], ["context", "batch"]]) {
    const shown = alike.filter((row) => String(row[other]) === state[other]);
    const listed = unique(shown.map((row) => row[field])).sort((a, b) => a - b);
    if (listed.length < 2) continue;
    const lines = unique(shown.map((row) => `${named(row)} ${row.target}`)).map((key) => {
      const own = shown.filter((row) => `${named(row)} ${row.target}` === key).sort((a, b) => a[field] - b[field]);
      const points = own.map((row, i) => ({
        x: row[field], y: row.speedup[0], low: row.speedup[1], high: row.speedup[2], title: `${row.label}, ${field} ${row[field]}: ${interval(row.speedup)} ${row.verdict}`,
        label: i === own.length - 1 ? target(row) : null,
      }));
      return { name: named(own[0]), key: keyed(own[0]), line: true, points };
    });
    chart(place, {
      title: `Speed-up against ${field}, ${other} ${state[other]}`, series: lines, unity: true,
      x: { kind: "ordinal", label: field, listed }, y: { kind: "linear", label: "speed-up over fastest dense" },
    });
  }
  if (!place.children.length) empty(place, "This model and machine have one batch and one context, or no speed-up.");
}

function drawLayers(found) {
  const place = at("layers");
  place.replaceChildren();
  const shown = charted(found).filter((row) => !row.baseline && Object.keys(row.sites).length && chosen(row));
  const sites = unique(shown.flatMap((row) => Object.keys(row.sites)));
  if (!sites.length) return empty(place, "No method of this choice skips anything.");
  if (!sites.includes(state.site)) state.site = sites[0];
  const change = (event) => { state.site = event.target.value; update(); at("layers").querySelector("select").focus(); };
  const options = sites.map((site) => make("option", { value: site, selected: site === state.site ? "" : null }, site));
  const sited = shown.filter((row) => row.sites[state.site]), middle = (row) => Math.abs((row.target ?? 1) - 0.5);
  const many = crowded(sited), name = many ? (row) => `${row.label}${row.options ? ` (${row.options})` : ""}` : named;
  const own = many ? unique(sited.map((row) => row.method)).map((method) => sited.filter((row) => row.method === method)
    .reduce((a, b) => (middle(b) < middle(a) ? b : a))) : sited;
  const site = (row) => row.sites[state.site];
  const lines = (rows, points, more = () => ({})) => rows.map((row) => {
    const turn = own.filter((r) => named(r) === named(row)).indexOf(row);
    return { name: name(row), key: keyed(row), line: true, dash: ["", "6 3", "2 3", "9 3 2 3"][turn % 4] || null, points: points(row), ...more(row) };
  });
  const layers = (row) => site(row).layers.map((y, i, all) => {
    const [low, high] = site(row).spread?.[i] ?? [];
    return { x: i + 1, y, low, high, title: `${row.label}, layer ${i + 1}: ${number(y)}`, label: i === all.length - 1 ? target(row) : null };
  });
  chart(place, {
    title: `Density of ${state.site} by layer`,
    series: lines(own, layers, (row) => ({ markers: site(row).layers.length <= 12, shade: Boolean(site(row).spread) })),
    x: { kind: "linear", label: "layer" }, y: { kind: "linear", label: "density", zero: true },
  });
  const counted = own.filter((row) => site(row).tokens);
  const tokens = (row) => site(row).tokens.map((y, i, all) => ({ x: i / (all.length - 1), y }));
  if (counted.length) chart(place, {
    title: `Density of ${state.site}, token by token`, series: lines(counted, tokens, () => ({ markers: false })),
    x: { kind: "linear", label: "density of one token in one layer" }, y: { kind: "linear", label: "share of tokens, all layers", zero: true },
  });
  const together = own.filter((row) => site(row).unions);
  const unions = (row) => Object.entries(site(row).unions).map(([n, y]) => ({ x: Number(n), y, title: `${row.label}, ${n} sequences: ${number(y)}` }));
  const chance = (row) => unions(row).map(({ x }) => ({ x, y: site(row).layers.reduce((sum, d) => sum + 1 - (1 - d) ** x, 0) / site(row).layers.length }));
  if (together.length) chart(place, {
    title: `Density of ${state.site}, of sequences together`,
    series: [...lines(together, unions), ...lines(together, chance, () => ({ markers: false, dash: "1 4" }))],
    x: { kind: "ordinal", label: "sequences decoded together", listed: unique(together.flatMap((row) => unions(row).map((p) => p.x))).sort((a, b) => a - b) },
    y: { kind: "linear", label: "density of their union", zero: true },
  });
  place.prepend(make("label", { class: "row" }, "Site", make("select", { change, name: "site" }, ...options)));
}

function drawTime(found) {
  const place = at("time");
  place.replaceChildren();
  const shown = charted(found).filter((row) => row.time && share(row) !== null && chosen(row));
  if (!shown.length) return empty(place, "No step of this choice was traced.");
  const kinds = unique(shown.flatMap((row) => Object.keys(row.time)));
  const colour = (kind) => (kind === "idle" ? "var(--line)" : COLOURS[kinds.indexOf(kind) % COLOURS.length]);
  const sum = (row) => Object.values(row.time).reduce((a, b) => a + b, 0);
  const dense = (row) => row.ms / share(row), total = Math.max(...shown.map((row) => sum(row) / dense(row)));
  const width = Math.max(280, Math.min(place.clientWidth, 900)), height = 24;
  const left = 8 + 7 * Math.max(...shown.map((row) => row.label.length));
  const bars = shown.map((row) => {
    const text = `${row.label}: ${kinds.map((kind) => `${kind} ${number(row.time[kind])}`).join(", ")} ms`;
    const svg = make("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": text, style: `max-width:${width}px` });
    svg.append(make("svg:text", { x: 0, y: 16 }, row.label, make("svg:title", {}, row.options)));
    let x = left;
    for (const kind of kinds) {
      const own = ((row.time[kind] ?? 0) / dense(row) / total) * (width - left - 70);
      const bar = { x, y: 3, width: own, height: 18, style: `fill:${colour(kind)}` };
      svg.append(make("svg:rect", bar, make("svg:title", {}, `${kind}: ${number(row.time[kind])} ms`)));
      x += own;
    }
    svg.append(make("svg:text", { x: x + 6, y: 16 }, `${number(sum(row))} ms`));
    return svg;
  });
  const entries = kinds.map((kind) => make("li", {}, make("svg:svg", { viewBox: "0 0 14 14", "aria-hidden": "true" }, make("svg:rect", { width: 14, height: 14, style: `fill:${colour(kind)}` })), kind));
  place.append(make("figure", { class: "bars" }, ...bars, make("ul", { class: "legend", "aria-label": "Legend" }, ...entries)));
}

// ---- tables

const ratio = (value, dense) => (value === null ? NONE : `${number(value)}${dense ? ` (${(value / dense).toFixed(3)})` : ""}`);
/** [title, text, key to sort by]; without a key the text itself. */
const SETTING = [["mode", (r) => r.mode], ["batch", (r) => String(r.batch), (r) => r.batch], ["context", (r) => String(r.context), (r) => r.context]];
const COLUMNS = [
  ["method", (r) => r.label],
  ["options", (r) => r.options || NONE],
  ["seeds", (r) => (r.seeds > 1 ? String(r.seeds) : NONE), (r) => r.seeds],
  ["rank ≤ 1 %", (r) => r.ranks[0]?.text ?? NONE, (r) => r.ranks[0]?.place ?? null],
  ["rank ≤ 3 %", (r) => r.ranks[1]?.text ?? NONE, (r) => r.ranks[1]?.place ?? null],
  ["speed-up [95 %]", (r) => (r.cpu ? NONE : interval(r.speedup)), (r) => (r.cpu ? null : r.speedup?.[0] ?? null)],
  ["verdict", (r) => (r.cpu ? NONE : r.verdict ?? NONE)],
  ["accuracy lost, %", (r) => (r.loss ? `${r.loss[0].toFixed(2)} (${r.budget})` : NONE), (r) => r.loss?.[0] ?? null],
  ["MB/token (÷ dense)", (r) => ratio(r.mb, r.mbDense), (r) => r.mb],
  ["GFLOP/token (÷ dense)", (r) => ratio(r.gflop, r.gflopDense), (r) => r.gflop],
  ["ms/step [p10, p90]", (r) => (r.ms === null ? NONE : `${number(r.ms)} [${number(r.p10)}, ${number(r.p90)}]${r.cpu ? " CPU reference" : ""}`), (r) => r.ms],
  ["of byte limit", (r) => percent(r.limit), (r) => r.limit],
  ["realised density", (r) => number(r.density), (r) => r.density],
  ["Δ tasks, points [95 %]", (r) => interval(r.tasks, 1), (r) => r.tasks?.[0] ?? null],
  ["perplexity", (r) => number(r.perplexity, 4), (r) => r.perplexity],
  ["÷ dense [95 %]", (r) => interval(r.ratio), (r) => r.ratio?.[0] ?? null],
  ["KL, nats/token", (r) => number(r.kl), (r) => r.kl],
  ["greedy agreement", (r) => percent(r.agreement), (r) => r.agreement],
  ["training tokens", (r) => number(r.tokens), (r) => r.tokens],
  ["preparation, s", (r) => number(r.seconds), (r) => r.seconds],
  ["artifact, MB", (r) => number(r.artifact), (r) => r.artifact],
  ["extra memory, MB", (r) => number(r.memory), (r) => r.memory],
  ["fidelity", (r) => r.fidelity],
  ["record", (r) => make("a", { href: r.link, title: `key ${r.key}` }, `${r.set} ${r.key.slice(0, 8)}`), (r) => r.key],
];
const CLAIMS = [
  ["claim", (c) => `${c.paper}: ${c.claim}`],
  ["verdict", (c) => make("span", { class: `verdict ${{ reproduced: "good", "not reproduced": "bad" }[c.verdict] ?? ""}` }, c.verdict), (c) => c.order],
  ["measured here", (c) => c.measured],
  ["cell", (c) => c.cell],
  ["what differs or lacks", (c) => c.remarks],
  ["its setting", (c) => c.setting],
  ["paper", (c) => make("a", { href: `https://arxiv.org/abs/${c.arxiv}` }, `arXiv ${c.arxiv}`), (c) => c.arxiv],
];

/** A table whose titles sort it; missing values stay at the end. `sorted`: { column, down } or null, kept by the caller. */
function table(place, caption, columns, data, sorted, remember) {
  const key = ([, text, sort]) => sort ?? text;
  let order = data;
  const column = columns.find(([title]) => title === sorted?.column);
  if (column) {
    const value = (entry) => { const v = key(column)(entry); return v === NONE ? null : v; };
    const sign = sorted.down ? -1 : 1;
    const compare = (a, b) => (a === null) - (b === null) || (a === null ? 0 : sign * (typeof a === "number" ? a - b : String(a).localeCompare(String(b))));
    order = [...data].sort((a, b) => compare(value(a), value(b)));
  }
  const head = columns.map(([title]) => {
    const active = sorted?.column === title;
    const click = () => remember({ column: title, down: active ? !sorted.down : false });
    return make("th", { scope: "col", "aria-sort": active ? (sorted.down ? "descending" : "ascending") : "none" }, make("button", { type: "button", click }, title));
  });
  const body = order.map((entry) => make("tr", { class: entry.baseline ? "baseline" : null, role: "row" }, ...columns.map((c, i) => {
    const text = c[1](entry), numeric = c[2] && typeof c[2](entry) === "number" && typeof text === "string";
    const cell = i ? { class: numeric ? "number" : null, role: "cell" } : { scope: "row", role: "rowheader" };
    return make(i ? "td" : "th", { ...cell, "data-title": c[0] }, text);
  })));
  const whole = make("table", { role: "table" }, make("caption", { class: "note", style: "text-align:left;padding:.35rem .6rem" }, caption), make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body));
  const scroll = place.querySelector(".scroll");
  const [left, top] = scroll ? [scroll.scrollLeft, scroll.scrollTop] : [0, 0];
  const focused = scroll?.contains(document.activeElement) ? document.activeElement.textContent : null;
  place.replaceChildren(make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, whole));
  place.firstChild.scrollTo(left, top);
  if (focused) [...place.querySelectorAll("button")].find((b) => b.textContent === focused)?.focus();
}

let sortedCells = null, sortedClaims = null;
function drawTables(found) {
  const all = state.all === "1";
  const shown = all ? narrowed(2) : found;
  const where = `${state.model} on ${state.place}${all ? "" : `, ${state.mode}, batch ${state.batch}, context ${state.context}`}`;
  const [first, ...rest] = COLUMNS;
  const columns = all ? [first, ...SETTING, ...rest] : COLUMNS;
  const told = columns.filter(([title, text]) => title === "method" || shown.some((row) => text(row) !== NONE));
  table(at("table"), `${shown.length} cells: ${where}`, told, shown, sortedCells, (s) => { sortedCells = s; drawTables(found); });
  const dense = found.find((row) => row.dense)?.dense;
  at("baselines").textContent = dense && !all ? `Dense in the same run, ms/step: ${dense}.` : "";
  at("machines").replaceChildren(...unique(shown.map((row) => row.machine)).map((i) => make("li", {}, machines[i])));
}
function drawClaims() {
  table(at("claims"), `${claims.length} claims`, CLAIMS, claims, sortedClaims, (s) => { sortedClaims = s; drawClaims(); });
}

function draw() {
  const found = narrowed();
  drawPareto(found);
  drawGrid();
  drawLayers(found);
  drawTime(found);
  drawTables(found);
}
function update() {
  drawFilters();
  draw();
  history.replaceState(null, "", `#${new URLSearchParams(state)}`);
}

drawFilters();
draw();
drawClaims();
let waiting = 0, width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(draw, 150);
});
addEventListener("hashchange", () => { Object.assign(state, Object.fromEntries(new URLSearchParams(location.hash.slice(1)))); drawFilters(); draw(); });
document.documentElement.dataset.ready = "1";
