// Draws the page's charts from the JSON in #data, and makes its tables fit, sort and filter.
// All text reaches the page as text nodes: names and settings may be a stranger's.
"use strict";

const {rows, band, levels, range} = JSON.parse(document.getElementById("data").textContent);
// Of the sparsities in turn: the chart's name of a shape, and its path in a legend.
const SHAPES = [["circle", "M18 3a5 5 0 1 1 0 10a5 5 0 1 1 0-10"], ["rect", "M13 3h10v10h-10z"],
  ["diamond", "M18 2l5 6l-5 6l-5-6z"], ["triangle", "M18 3l6 10h-12z"]];
const DASHES = ["solid", [6, 4], [8, 3, 2, 3], [2, 3]];
const drawn = new Map(); // element -> chart
const shape = number => SHAPES[number % SHAPES.length];
const NARROW = 600; // pixels, below which only the rows to take are labelled
const LINE = 13, MARK = 10; // pixels: height of a label, width of a point
const LIFTS = [0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6]; // lines by which a label is off its point
const EDGES = {left: 56, right: 16, top: 12, bottom: 44}; // pixels around a chart
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const percent = level => (level ? `${+(100 * level).toPrecision(4)} %` : "dense");
const number = value => value.toFixed(2);

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const accuracy = ([mean, spread]) => number(mean) + (spread === null ? "" : ` ± ${number(spread)}`);
const facts = row => ({
  "top-1 %": accuracy(row.top1),
  "state, peak": `${number(row.peak)} bytes a weight`,
  "state, end": `${number(row.end)} bytes a weight`,
  ...row.settings,
});

/** What hovering a point or a line shows: the run's figures and settings, and its folders. */
function tip(row) {
  const list = make("dl");
  for (const [name, value] of Object.entries(facts(row)))
    list.append(make("dt", {textContent: name}), make("dd", {textContent: value}));
  const links = row.runs.flatMap(([seed, href]) => [" ", make("a", {href, textContent: `seed ${seed}`})]);
  return make("div", {className: "tip"}, make("strong", {textContent: row.label}), list, "run folders:", ...links);
}

function common(element, rowOf) {
  const text = {color: colour("ink"), fontFamily: "system-ui, sans-serif"};
  const axis = {
    nameLocation: "middle", nameTextStyle: text, axisLabel: {...text, hideOverlap: true},
    axisLine: {lineStyle: {color: colour("rule")}}, splitLine: {lineStyle: {color: colour("band")}},
  };
  const tooltip = {
    enterable: true, confine: true, appendTo: () => element.parentElement, formatter: point => tip(rowOf(point)),
    backgroundColor: colour("paper"), borderColor: colour("rule"), textStyle: text,
  };
  const options = {
    animation: false, textStyle: text, tooltip, grid: {...EDGES, containLabel: false},
  };
  return {axis, options};
}

const look = row => ({color: row.colour ?? colour("other")});

const pen = document.createElement("canvas").getContext("2d");
const font = row => `${row.pick ? "bold " : ""}12px system-ui, sans-serif`;

function wide(row) {
  pen.font = font(row);
  return pen.measureText(row.label).width;
}

/** Where each label goes: at its point's right or left, or a few lines off; over no other, no point, and not cut. The
    rows to take come first and have one in any case; others that find no place are left to hovering. */
function placed(labelled, points, {clientWidth, clientHeight}) {
  const taken = points.map(([x, y]) => ({left: x - MARK / 2, size: MARK, top: y}));
  const apart = (box, other) => Math.abs(box.top - other.top) >= LINE
    || box.left >= other.left + other.size || other.left >= box.left + box.size;
  const inside = ({left, size, top}) => left >= EDGES.left && left + size <= clientWidth
    && top >= LINE && top <= clientHeight - EDGES.bottom - LINE / 2;
  return labelled.sort((a, b) => b.row.pick - a.row.pick || b.at[1] - a.at[1]).flatMap(({row, at: [x, y]}) => {
    const size = wide(row);
    const within = Math.max(EDGES.left, Math.min(x - size / 2, clientWidth - size)); // for a long one on a narrow screen
    const boxes = LIFTS.flatMap(lift => [x + 14, x - 14 - size, ...(lift ? [within] : [])].map(
      left => ({left, size, top: y + LINE * lift})));
    const box = boxes.find(one => inside(one) && taken.every(other => apart(one, other))) ?? (row.pick && boxes[0]);
    if (!box) return [];
    taken.push(box);
    return [{row, x, y, ...box}];
  });
}

function pareto(element) {
  const narrow = element.clientWidth < NARROW;
  const {axis, options} = common(element, point => rows[point.data.row]);
  const ordered = [...rows].sort((a, b) => a.place - b.place || b.top1[0] - a.top1[0]);
  const [least, most] = [ordered[0].place / 1.2, ordered.at(-1).place * 1.3];
  const best = ordered.filter((row, at) => ordered.slice(0, at).every(other => other.top1[0] < row.top1[0]));
  const front = best.map(row => [row.place, row.top1[0]]);
  front.push([most, front.at(-1)[1]]);
  const seen = row => row.top1[0] >= range[0];
  const coloured = rows.filter(row => row.colour && seen(row));
  const points = level => rows.flatMap((row, index) => row.level === level && seen(row)
    ? [{value: [row.place, row.top1[0]], row: index, itemStyle: look(row)}] : []);
  const labelled = rows.filter(row => seen(row) && (row.pick || (!narrow && (row.colour || best.includes(row)))));
  const whisker = ({dataIndex}, api) => {
    const {top1: [mean, spread], place, colour: stroke} = coloured[dataIndex];
    const [[x1, y1], [x2, y2]] = [-1, 1].map(side => api.coord([place, mean + side * spread]));
    return {type: "line", shape: {x1, y1, x2, y2}, style: {stroke}};
  };
  const at = (row, api) => api.coord([row.place, row.top1[0]]);
  const label = (_, api) => ({type: "group", children: placed(
    labelled.map(row => ({row, at: at(row, api)})), rows.filter(seen).map(row => at(row, api)), element,
  ).flatMap(({row, x, y, left, size, top}) => [
    {type: "line", style: {stroke: look(row).color},
      shape: {x1: x, y1: y, x2: Math.max(left - 2, Math.min(x, left + size + 2)), y2: top}},
    {type: "text", x: left + size < x ? left + size : left, y: top, style: {
      text: row.label, align: left + size < x ? "right" : "left", verticalAlign: "middle",
      fill: colour("ink"), backgroundColor: colour("paper"), padding: [0, 2], font: font(row),
    }},
  ])});
  const ends = {showMinLabel: false, showMaxLabel: false};
  return {
    ...options,
    xAxis: {...axis, type: "log", logBase: 2, min: least, max: most, nameGap: 26, axisLabel: {...axis.axisLabel, ...ends},
      name: `${narrow ? "state" : "optimizer state and pruning"} at the peak (bytes a weight${narrow ? "" : ", logarithmic"})`},
    yAxis: {...axis, type: "value", min: range[0], max: range[1], name: "final top-1 (%)", nameGap: 40,
      axisLabel: {...axis.axisLabel, ...ends}},
    series: [
      {type: "line", data: front, step: "end", silent: true, symbol: "none", z: 1,
        lineStyle: {color: colour("faint"), width: 1}},
      {type: "custom", data: coloured.map(row => [row.place, row.top1[0]]), silent: true, clip: true, z: 1,
        renderItem: whisker},
      ...levels.map((level, number) => ({
        type: "scatter", data: points(level), symbol: shape(number)[0], symbolSize: MARK, z: 2,
        markArea: number || !band ? undefined : {
          silent: true, itemStyle: {color: colour("rule"), opacity: .35}, data: [[{yAxis: band.low}, {yAxis: band.high}]],
        },
      })),
      {type: "custom", data: [[ordered[0].place, range[0]]], silent: true, z: 3, renderItem: label},
    ],
  };
}

/** Lines of some rows, those in colour with a band of their spread; `curve`: row -> [x, y, spread or null] each. */
function lines(element, shown, curve, x, y, scale = {}) {
  const {axis, options} = common(element, point => shown[point.seriesIndex % shown.length]);
  const line = (row, index) => ({
    type: "line", data: curve(row).map(([at, value]) => [at, value]), symbolSize: 5, symbol: "circle",
    itemStyle: look(row), lineStyle: {...look(row), width: row.colour ? 2 : 1, type: DASHES[row.dash]},
    z: row.colour ? 3 : 2,
  });
  const spread = row => {
    const known = row.colour ? curve(row).filter(([, , width]) => width) : [];
    const low = known.map(([at, value, width]) => [at, value - width]);
    const outline = [...known.map(([at, value, width]) => [at, value + width]), ...low.reverse()];
    return {type: "custom", data: outline.slice(0, 1), silent: true, clip: true, z: 1, renderItem: (_, api) => ({
      type: "polygon", shape: {points: outline.map(point => api.coord(point))},
      style: {fill: row.colour, opacity: .15},
    })};
  };
  return {
    ...options,
    xAxis: {...axis, type: "value", name: x, nameGap: 26, max: "dataMax"},
    yAxis: {...axis, type: "value", name: y, nameGap: 40, ...scale},
    series: [...shown.map(line), ...shown.map(spread)],
  };
}

/** The lowest accuracy after a third of the epochs, of the rows in colour if there are: where the axis begins. */
function floor(shown) {
  const coloured = shown.filter(row => row.colour);
  return Math.min(...(coloured.length ? coloured : shown).map(row => row.floor));
}

const CHARTS = {
  pareto,
  memory_timeline: (element, shown) => lines(
    element, shown.filter(row => row.memory.length), row => row.memory, "optimizer step", "state (bytes a weight)", {min: 0}),
  accuracy: (element, shown) => lines(
    element, shown, row => row.accuracy, "epoch", "top-1 (%)", {min: Math.max(0, Math.floor(floor(shown) - 2))}),
  sparsity: (element, shown) => lines(
    element, shown.filter(row => row.level), row => row.sparsity, "epoch", "zeros (%)", {min: 0, max: 100}),
};

function legend(element, entries) {
  element.parentElement.querySelector(".legend")?.remove();
  const list = make("ul", {className: "legend"});
  for (const [text, path, attributes] of entries) {
    const swatch = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    swatch.setAttribute("viewBox", "0 0 36 16");
    swatch.setAttribute("aria-hidden", "true");
    const mark = document.createElementNS("http://www.w3.org/2000/svg", "path");
    for (const [name, value] of Object.entries({d: path, ...attributes})) mark.setAttribute(name, value);
    swatch.append(mark);
    list.append(make("li", {}, swatch, text));
  }
  element.after(list);
}

const below = hidden => (hidden.length > 6 ? `${hidden.length} rows are below the frame`
  : `below the frame: ${hidden.map(row => `${row.label} (${number(row.top1[0])})`).join(", ")}`);

function legends(element, shown) {
  const fill = colour("faint"), other = {stroke: colour("other"), "stroke-width": 2, fill: "none"};
  if (element.id === "pareto") {
    const hidden = rows.filter(row => row.top1[0] < range[0]);
    const names = new Map(rows.filter(row => row.colour).map(row => [row.name, row.colour]));
    const unnamed = element.clientWidth < NARROW ? [...names] : []; // their points have no label
    return legend(element, [
      ...levels.map((level, number) => [percent(level) + (level ? " sparsity" : ""), shape(number)[1], {fill}]),
      ["best for its bytes", "M2 12h16v-8h16", {stroke: fill, fill: "none"}],
      ...(band ? [[`${band.name} ± its spread over seeds`, "M2 2h32v12h-32z", {fill: colour("rule"), opacity: .6}]] : []),
      ...(rows.some(row => !row.colour) ? [["others", "M13 3h10v10h-10z", {fill: other.stroke}]] : []),
      ...unnamed.map(([name, fill]) => [name, shape(1)[1], {fill}]),
      ...(hidden.length ? [[below(hidden), "", {}]] : []),
    ]);
  }
  const named = shown.filter(row => row.colour && (element.id !== "memory_timeline" || row.memory.length)
    && (element.id !== "sparsity" || row.level));
  const dashes = row => (row.dash ? DASHES[row.dash].join(" ") : "none");
  return legend(element, [
    ...named.map(row => [row.label, "M2 8h32", {stroke: row.colour, "stroke-width": 3, "stroke-dasharray": dashes(row)}]),
    ...(shown.some(row => !row.colour) ? [["others", "M2 8h32", other]] : []),
  ]);
}

function draw(select) {
  const level = +select.value;
  const shown = rows.filter(row => row.level === level || (!row.level && row.colour));
  for (const element of document.querySelectorAll(".chart")) {
    legends(element, shown);
    if (!drawn.has(element)) drawn.set(element, echarts.init(element));
    drawn.get(element).resize();
    drawn.get(element).setOption(CHARTS[element.id](element, shown), {notMerge: true});
  }
}

/** A table that does not fit is shown as cards; measured anew whenever it may have changed. */
function fit() {
  for (const box of document.querySelectorAll(".table")) {
    box.classList.remove("cards");
    box.classList.toggle("cards", box.scrollWidth > box.clientWidth);
  }
}

const value = cell => {
  const figure = parseFloat(cell.textContent.replaceAll(",", "").replace("*", ""));
  return Number.isNaN(figure) ? -Infinity : figure;
};

function sortable(table) {
  table.parentElement.classList.add("sortable");
  for (const [column, head] of [...table.tHead.rows[0].cells].entries()) {
    const button = make("button", {type: "button"}, ...head.childNodes);
    head.replaceChildren(button);
    button.onclick = () => {
      const up = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up > 0 ? "ascending" : "descending");
      const cells = row => row.cells[column];
      const order = column === 0
        ? (a, b) => -cells(a).textContent.localeCompare(cells(b).textContent)
        : (a, b) => value(cells(a)) - value(cells(b));
      const sorted = [...table.tBodies[0].rows].sort((a, b) => up * order(a, b));
      table.tBodies[0].append(...sorted);
    };
  }
}

function filter(details, tables) {
  const input = make("input", {type: "search"}), count = make("output");
  input.oninput = () => {
    const words = input.value.toLowerCase().split(/\s+/);
    const all = tables.flatMap(table => [...table.tBodies[0].rows]);
    for (const row of all) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
    count.value = ` ${all.filter(row => !row.hidden).length} of ${all.length} rows`;
  };
  details.querySelector("summary").after(make("p", {}, make("label", {}, "Show rows with ", input), count));
}

function tables() {
  const byLabel = new Map(rows.map(row => [row.label, row]));
  for (const table of document.querySelectorAll("table")) {
    const labels = [...table.tHead.rows[0].cells].map(cell => cell.textContent);
    for (const line of table.tBodies[0].rows) {
      for (const [column, cell] of [...line.cells].entries()) cell.dataset.label = labels[column] ?? "";
      const row = byLabel.get(line.cells[0].textContent);
      const title = row && Object.entries(facts(row)).map(fact => fact.join(": ")).join("\n");
      if (row) line.cells[0].replaceChildren(make("a", {href: row.runs[0][1], textContent: row.label, title}));
    }
  }
  for (const details of document.querySelectorAll("details")) {
    const long = [...details.querySelectorAll("table")].filter(table => table.tBodies[0].rows.length > 4);
    long.forEach(sortable);
    if (long.length) filter(details, [...details.querySelectorAll("table")]);
    details.ontoggle = fit;
  }
}

function start() {
  tables();
  const select = make("select", {}, ...levels.map(level => make("option", {value: level, textContent: percent(level)})));
  const pruned = levels.filter(level => level);
  select.value = pruned[Math.floor(pruned.length / 2)] ?? 0;
  select.onchange = () => draw(select);
  const after = document.querySelector(".chart:not(#pareto)")?.closest("figure");
  if (after && levels.length > 1)
    after.before(make("p", {}, make("label", {}, "Sparsity shown from here on, beside dense: ", select)));
  const again = () => { fit(); draw(select); };
  again();
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; again(); } });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
}

start();
