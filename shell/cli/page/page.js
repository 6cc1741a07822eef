"use strict";
// What the page shows is in `data`: core/draw/dashboard.py says what each value means.

const data = JSON.parse(document.getElementById("data").textContent);
const main = document.querySelector("main"), tip = document.getElementById("tip");
const root = document.documentElement;
window.onerror = (message) => { document.body.dataset.error = message; };

// -- elements ------------------------------------------------------------------------------------------------

function element(name, attributes = {}, ...children) {
  const made = name.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4))
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== null) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const style = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = !text;
  if (!text) return;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 8))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 8) : y + 18}px`;
}

// -- numbers in words ----------------------------------------------------------------------------------------

function seconds(value) {
  const size = Math.abs(value);
  if (size === 0) return "0 s";
  if (size < 1e-3) return `${digits(value * 1e6)} µs`;
  return size < 1 ? `${digits(value * 1e3)} ms` : `${digits(value)} s`;
}

function bytes(value) {
  for (const [factor, unit] of [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
    if (value >= factor) return `${Number((value / factor).toPrecision(3))} ${unit}`;
  }
  return `${value} B`;
}

const digits = (value) => `${Number(value.toPrecision(4))}`;

// Steps of 1, 2 or 5 times a power of ten, at most `most` of them between two numbers.
function ticks(low, high, most) {
  const rough = (high - low) / Math.max(most, 1) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((size) => size >= rough);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high * (1 + 1e-12); i++) found.push(i * step);
  return found;
}

// -- colours of actions --------------------------------------------------------------------------------------

const KINDS = { FORWARD: "forward", BACKWARD: "backward", BACKWARD_PART: "part of a backward", INPUT_GRADIENT: "gradient of inputs", WEIGHT_GRADIENT: "gradient of weights" };
const LETTERS = { FORWARD: "F", BACKWARD: "B", BACKWARD_PART: "B/", INPUT_GRADIENT: "I", WEIGHT_GRADIENT: "W" };

// A forward is light, a backward dark, the gradient of inputs dark and striped, that of weights an outline.
function fillCell(brush, ink, kind, x, y, width, height) {
  if (kind === "WEIGHT_GRADIENT") {
    brush.fillStyle = "#ffffff";
    brush.fillRect(x, y, width, height);
    brush.strokeStyle = ink.dark;
    brush.lineWidth = 1.5;
    if (width > 3) brush.strokeRect(x + 0.75, y + 0.75, width - 1.5, height - 1.5);
    else { brush.fillStyle = ink.dark; brush.fillRect(x, y, width, height); }
    return ink.dark;
  }
  brush.fillStyle = kind === "FORWARD" ? ink.light : ink.dark;
  brush.fillRect(x, y, width, height);
  if (kind === "INPUT_GRADIENT" && width > 4) stripes(brush, x, y, width, height, "rgba(255,255,255,.45)", 6, 1);
  return kind === "FORWARD" ? "#1d2733" : "#ffffff";
}

function stripes(brush, x, y, width, height, colour, apart, slope) {
  brush.save();
  brush.beginPath();
  brush.rect(x, y, width, height);
  brush.clip();
  brush.strokeStyle = colour;
  brush.lineWidth = slope ? 2 : 1;
  brush.beginPath();
  if (slope) {
    const first = Math.floor((x - height) / apart) * apart;
    for (let at = first; at < x + width; at += apart) { brush.moveTo(at, y + height); brush.lineTo(at + height, y); }
  } else for (let at = y + 2; at < y + height; at += apart) { brush.moveTo(x, at); brush.lineTo(x + width, at); }
  brush.stroke();
  brush.restore();
}

// Idle times differ without colour: dots for a slower stage, slants for a message, lines for the drain.
function fillIdle(brush, cause, x, y, width, height) {
  brush.fillStyle = style("panel");
  brush.fillRect(x, y, width, height);
  if (width < 4) return;
  if (cause === "waits for a message") stripes(brush, x, y, width, height, style("idle"), 7, 1);
  else if (cause === "drain") stripes(brush, x, y, width, height, style("idle"), 4, 0);
  else if (cause === "waits for a slower stage" && width < 3000) {
    brush.fillStyle = style("idle");
    for (let at = x + 3; at < x + width - 1; at += 6) brush.fillRect(at, y + height / 2 - 1, 1.6, 1.6);
  }
}

// -- a timeline ----------------------------------------------------------------------------------------------

const LEFT = 215, RIGHT = 78, CELL = 18, STRIP = 14, GAP = 7, AXIS = 24;

class TimelineView {
  constructor(timeline, modules) {
    Object.assign(this, { timeline, modules, row: 0, item: -1, begin: 0, end: timeline.parts });
    this.kinds = timeline.names.map((name) => name.split("|"));
    this.rows = timeline.rows.map((row) => this.unpacked(row));
    this.mostBytes = Math.max(1, ...this.rows.map((row) => row.peak));
    this.rowHeight = CELL + GAP + (this.mostBytes > 1 ? STRIP : 0);
    this.axis = element("canvas", { class: "axis", "aria-hidden": "true" });
    this.canvas = element("canvas", {
      tabindex: 0, role: "application",
      "aria-label": "Timeline. Up and down choose a row, left and right an action, plus and minus zoom, 0 shows the whole step.",
    });
    this.scroller = element("div", { class: "rows" }, this.canvas);
    this.node = element("div", { class: "time" }, this.axis, this.scroller);
    this.listen();
    new ResizeObserver(() => requestAnimationFrame(() => this.resize())).observe(this.node);
  }

  // Return a row with its intervals as arrays of begins, ends and what they are, in order of time.
  unpacked(row) {
    const intervals = (numbers, size) => {
      const count = numbers.length / size;
      const made = { begin: new Float64Array(count), end: new Float64Array(count), what: new Int32Array(count), more: new Int32Array(count) };
      let at = 0;
      for (let i = 0; i < count; i++) {
        const from = i * size;
        at += numbers[from];
        made.begin[i] = at;
        at += numbers[from + 1];
        made.end[i] = at;
        made.what[i] = size > 2 ? numbers[from + 2] : 0;
        made.more[i] = size > 3 ? numbers[from + 3] : 0;
      }
      return made;
    };
    let at = 0;
    const memory = [];
    for (let i = 0; i < row.memory.length; i += 2) { at += row.memory[i]; memory.push([at, row.memory[i + 1]]); }
    const computes = intervals(row.computes, 4), others = intervals(row.others, 3), idles = intervals(row.idles, 3);
    const items = [];
    for (const [kind, found] of Object.entries({ computes, others, idles })) {
      for (let i = 0; i < found.begin.length; i++) items.push([found.begin[i], found.end[i], kind, i]);
    }
    items.sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    return { ...row, computes, others, idles, items, critical: intervals(row.critical, 2), memory };
  }

  get scale() { return (this.width - LEFT - RIGHT) / (this.end - this.begin); }
  x(time) { return LEFT + (time - this.begin) * this.scale; }
  time(x) { return this.begin + (x - LEFT) / this.scale; }
  inSeconds(parts) { return (parts / this.timeline.parts) * this.timeline.step; }

  resize() {
    const width = Math.max(360, this.scroller.clientWidth);
    if (width === this.width) return;
    this.width = width;
    this.height = this.rows.length * this.rowHeight + GAP;
    const dense = devicePixelRatio || 1;
    for (const [canvas, height] of [[this.canvas, this.height], [this.axis, AXIS]]) {
      canvas.width = this.width * dense;
      canvas.height = height * dense;
      canvas.style.width = `${this.width}px`;
      canvas.style.height = `${height}px`;
      canvas.getContext("2d").setTransform(dense, 0, 0, dense, 0, 0);
    }
    this.draw();
  }

  // Draw in the next frame, however often it is asked for.
  draw() {
    if (this.drawing) return;
    this.drawing = true;
    requestAnimationFrame(() => { this.drawing = false; this.paint(); });
  }

  paint() {
    const brush = this.canvas.getContext("2d");
    const first = Math.max(0, Math.floor(this.scroller.scrollTop / this.rowHeight) - 1);
    const last = Math.min(this.rows.length, first + Math.ceil(innerHeight / this.rowHeight) + 2);
    brush.clearRect(0, first * this.rowHeight, this.width, (last - first + 1) * this.rowHeight);
    brush.textBaseline = "middle";
    for (let i = first; i < last; i++) this.paintRow(brush, i);
    this.paintAxis();
  }

  paintAxis() {
    const brush = this.axis.getContext("2d");
    brush.clearRect(0, 0, this.width, AXIS);
    brush.font = "11px Helvetica, Arial, sans-serif";
    brush.textAlign = "center";
    brush.fillStyle = style("soft");
    const [low, high] = [this.inSeconds(this.begin), this.inSeconds(this.end)];
    for (const tick of ticks(low, high, (this.width - LEFT - RIGHT) / 90)) {
      const x = LEFT + ((tick - low) / (high - low)) * (this.width - LEFT - RIGHT);
      brush.fillRect(x, AXIS - 5, 1, 5);
      brush.fillText(seconds(tick), x, 12);
    }
  }

  paintRow(brush, number) {
    const row = this.rows[number], y = number * this.rowHeight + GAP;
    if (number === this.row && document.activeElement === this.canvas) {
      brush.fillStyle = style("panel");
      brush.fillRect(0, y - GAP / 2, this.width, this.rowHeight);
    }
    row.modules.forEach((module, i) => {
      const height = CELL / row.modules.length;
      brush.fillStyle = this.modules[module].dark;
      brush.fillRect(LEFT - 8, y + i * height, 4, height);
    });
    brush.fillStyle = style("ink");
    brush.font = "12px Helvetica, Arial, sans-serif";
    brush.textAlign = "right";
    brush.fillText(fitted(brush, row.source ? `${row.source}  ${row.name}` : row.name, LEFT - 18), LEFT - 13, y + CELL / 2);
    brush.save();
    brush.beginPath();
    brush.rect(LEFT, y - 2, this.width - LEFT - RIGHT, this.rowHeight);
    brush.clip();
    this.each(row.idles, (i, x, width) => fillIdle(brush, this.timeline.causes[row.idles.what[i]], x, y, width, CELL));
    this.each(row.computes, (i, x, width) => this.paintCell(brush, row.computes, i, x, y, width));
    brush.fillStyle = style("soft");
    this.each(row.others, (i, x, width) => brush.fillRect(x, y + CELL * 0.3, width, CELL * 0.4));
    brush.strokeStyle = style("ink");
    brush.lineWidth = 1.6;
    this.each(row.critical, (i, x, width) => { if (width > 3) brush.strokeRect(x + 0.5, y - 0.5, width - 1, CELL + 1); });
    if (number === this.row && this.item >= 0) this.paintChosen(brush, row, y);
    this.paintMemory(brush, row, y + CELL + 1);
    brush.restore();
    if (row.peak) {
      brush.fillStyle = style("soft");
      brush.font = "11px Helvetica, Arial, sans-serif";
      brush.textAlign = "left";
      brush.fillText(bytes(row.peak), this.width - RIGHT + 6, y + CELL + STRIP / 2);
    }
  }

  // Call `paint` for intervals that are in view. Of those within one pixel the first stands for all.
  each(found, paint) {
    const { begin, end } = found;
    let low = 0, high = end.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (end[middle] < this.begin) low = middle + 1; else high = middle;
    }
    let until = -Infinity;
    for (let i = low; i < begin.length && begin[i] <= this.end; i++) {
      const right = this.x(end[i]);
      if (right < until + 0.7) continue;
      const left = Math.max(this.x(begin[i]), LEFT - 4);
      until = Math.min(right, this.width);
      paint(i, left, Math.max(until - left, 0.7));
    }
  }

  paintCell(brush, computes, i, x, y, width) {
    const [module, kind] = this.kinds[computes.what[i]];
    const gap = width > 6 ? 0.8 : 0;
    const colour = fillCell(brush, this.modules[module], kind, x, y, width - gap, CELL);
    const label = `${computes.more[i]}`;
    if (width < label.length * 7 + 4) return;
    brush.font = "11px Helvetica, Arial, sans-serif";
    brush.textAlign = "center";
    if (kind === "INPUT_GRADIENT") {
      brush.fillStyle = "#ffffff";
      brush.fillRect(x + width / 2 - label.length * 4, y + 3, label.length * 8, CELL - 6);
    }
    brush.fillStyle = kind === "INPUT_GRADIENT" ? "#1d2733" : colour;
    brush.fillText(label, x + width / 2, y + CELL / 2 + 0.5);
  }

  paintChosen(brush, row, y) {
    const [begin, end] = row.items[this.item];
    brush.strokeStyle = style("mark");
    brush.lineWidth = 3;
    brush.strokeRect(this.x(begin) - 1, y - 1, Math.max((end - begin) * this.scale, 3) + 2, CELL + 2);
  }

  paintMemory(brush, row, y) {
    if (!row.memory.length || this.mostBytes <= 1) return;
    const height = (size) => (size / this.mostBytes) * (STRIP - 2);
    const bottom = y + STRIP - 1;
    brush.fillStyle = style("passing");
    const levels = row.memory.filter(([at]) => at > this.begin && at <= this.end);
    const before = row.memory.filter(([at]) => at <= this.begin);
    let level = before.length ? before[before.length - 1][1] : row.memory[0][1];
    brush.beginPath();
    brush.moveTo(LEFT, bottom);
    brush.lineTo(LEFT, bottom - height(level));
    for (const [at, size] of levels) {
      brush.lineTo(this.x(at), bottom - height(level));
      brush.lineTo(this.x(at), bottom - height(size));
      level = size;
    }
    const right = this.x(Math.min(this.end, this.timeline.parts));
    brush.lineTo(right, bottom - height(level));
    brush.lineTo(right, bottom);
    brush.fill();
    brush.fillStyle = style("kept");
    brush.fillRect(LEFT, bottom - height(row.kept), right - LEFT, height(row.kept));
  }

  // -- what the user does

  zoom(factor, at = (this.begin + this.end) / 2) {
    const least = this.timeline.parts / 20000;
    const wide = Math.min(this.timeline.parts, Math.max(least, (this.end - this.begin) * factor));
    const part = (at - this.begin) / (this.end - this.begin);
    this.show(at - part * wide, at + (1 - part) * wide);
  }

  show(begin, end) {
    const wide = end - begin;
    this.begin = Math.min(Math.max(0, begin), this.timeline.parts - wide);
    this.end = this.begin + wide;
    this.draw();
  }

  listen() {
    this.canvas.addEventListener("wheel", (event) => {
      const across = event.shiftKey ? event.deltaY : event.deltaX;
      if (event.ctrlKey || event.metaKey) this.zoom(Math.exp(event.deltaY * 0.003), this.time(event.offsetX));
      else if (across) this.show(this.begin + across / this.scale, this.end + across / this.scale);
      else return;
      event.preventDefault();
    }, { passive: false });
    this.canvas.addEventListener("pointerdown", (event) => {
      this.dragged = { x: event.clientX, begin: this.begin, end: this.end };
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointerup", () => { this.dragged = null; });
    this.canvas.addEventListener("pointercancel", () => { this.dragged = null; });
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => showTip(""));
    this.canvas.addEventListener("dblclick", (event) => this.zoom(0.4, this.time(event.offsetX)));
    this.canvas.addEventListener("keydown", (event) => { if (this.key(event.key)) event.preventDefault(); });
    this.canvas.addEventListener("focus", () => this.draw());
    this.canvas.addEventListener("blur", () => { this.item = -1; showTip(""); this.draw(); });
    this.scroller.addEventListener("scroll", () => this.draw());
  }

  point(event) {
    if (this.dragged) {
      const by = (this.dragged.x - event.clientX) / this.scale;
      this.show(this.dragged.begin + by, this.dragged.end + by);
      return showTip("");
    }
    const number = Math.floor((event.offsetY - GAP / 2) / this.rowHeight), row = this.rows[number];
    if (!row) return showTip("");
    const within = event.offsetY - number * this.rowHeight - GAP, time = this.time(event.offsetX);
    if (event.offsetX < LEFT) return showTip(`${row.name}\nranks ${row.ranks}`, event.clientX, event.clientY);
    if (event.offsetX > this.width - RIGHT) return showTip(row.peak ? `peak ${bytes(row.peak)}, of which ${bytes(row.kept)} all the time` : "", event.clientX, event.clientY);
    if (within > CELL) return showTip(this.held(row, time), event.clientX, event.clientY);
    const margin = 2 / this.scale;
    const found = row.items.find(([begin, end]) => begin - margin <= time && time <= end + margin && begin <= end);
    showTip(found ? this.words(row, found) : "", event.clientX, event.clientY);
  }

  held(row, time) {
    const before = row.memory.filter(([at]) => at <= time);
    return before.length ? `holds ${bytes(before[before.length - 1][1])} at ${seconds(this.inSeconds(time))}` : "";
  }

  words(row, [begin, end, kind, i]) {
    const when = `${seconds(this.inSeconds(begin))} to ${seconds(this.inSeconds(end))}: ${seconds(this.inSeconds(end - begin))}`;
    if (kind === "idles") return `idle: ${this.timeline.causes[row.idles.what[i]]}\n${when}`;
    if (kind === "others") return `${this.timeline.names[row.others.what[i]]}\n${when}`;
    const [, action, , stage] = this.kinds[row.computes.what[i]];
    const microbatch = row.computes.more[i];
    return `${stage} ${LETTERS[action]}${microbatch}: ${KINDS[action]} of microbatch ${microbatch}\n${when}`;
  }

  key(key) {
    const wide = this.end - this.begin;
    switch (key) {
      case "ArrowUp": case "ArrowDown": return this.choose(this.row + (key === "ArrowDown" ? 1 : -1), -1);
      case "ArrowRight": return this.choose(this.row, this.item + 1);
      case "ArrowLeft": return this.choose(this.row, Math.max(0, this.item - 1));
      case "Home": return this.choose(this.row, 0);
      case "End": return this.choose(this.row, Infinity);
      case "+": case "=": this.zoom(0.6, this.anchor()); return true;
      case "-": this.zoom(1 / 0.6, this.anchor()); return true;
      case "0": this.show(0, this.timeline.parts); return true;
      case "PageUp": this.show(this.begin - wide * 0.8, this.end - wide * 0.8); return true;
      case "PageDown": this.show(this.begin + wide * 0.8, this.end + wide * 0.8); return true;
      default: return false;
    }
  }

  anchor() {
    const chosen = this.rows[this.row].items[this.item];
    return chosen ? (chosen[0] + chosen[1]) / 2 : undefined;
  }

  choose(number, item) {
    this.row = Math.max(0, Math.min(number, this.rows.length - 1));
    const row = this.rows[this.row];
    this.item = Math.min(item, row.items.length - 1);
    const chosen = row.items[this.item];
    if (chosen && (chosen[0] < this.begin || chosen[1] > this.end)) {
      const wide = Math.max(this.end - this.begin, chosen[1] - chosen[0]);
      this.show(chosen[0] - wide * 0.3, chosen[0] + wide * 0.7);
    }
    const top = this.row * this.rowHeight;
    if (top < this.scroller.scrollTop) this.scroller.scrollTop = top;
    const bottom = top + this.rowHeight + GAP - this.scroller.clientHeight;
    if (bottom > this.scroller.scrollTop) this.scroller.scrollTop = bottom;
    this.draw();
    const box = this.canvas.getBoundingClientRect();
    const x = chosen ? box.left + Math.max(LEFT, this.x(chosen[0])) : box.left + LEFT;
    showTip(chosen ? this.words(row, chosen) : `${row.name}\nranks ${row.ranks}`, x, box.top + top + CELL);
    return true;
  }
}

function fitted(brush, text, width) {
  if (brush.measureText(text).width <= width) return text;
  let most = text.length;
  while (most > 1 && brush.measureText(`${text.slice(0, most)}…`).width > width) most--;
  return `${text.slice(0, most)}…`;
}

function timelineSection(timeline, modules) {
  const view = new TimelineView(timeline, modules);
  const whole = timeline.parts;
  const buttons = [
    ["zoom in", () => view.zoom(0.5)], ["zoom out", () => view.zoom(2)],
    ["whole step", () => view.show(0, whole)], ["begin", () => view.show(0, whole / 8)], ["end", () => view.show(whole * 7 / 8, whole)],
  ].map(([name, act]) => element("button", { type: "button", onclick: act }, name));
  const hint = element("span", {}, "Drag to move, Ctrl and wheel to zoom; with the keyboard: arrows, + and -, 0.");
  main.append(
    element("h2", {}, timeline.title || "Timeline"),
    ...(timeline.note ? [element("p", {}, timeline.note)] : []),
    element("div", { class: "bar" }, ...buttons, hint),
    legend(view), view.node,
  );
  return view;
}

function legend(view) {
  const used = new Set(view.kinds.filter((kind) => kind.length > 1).map(([module, kind]) => `${module}|${kind}`));
  const all = view.modules.flatMap((_, module) => Object.keys(KINDS).map((kind) => [module, kind]));
  const samples = all.filter(([module, kind]) => used.has(`${module}|${kind}`)).map(([module, kind]) => {
    return [`${view.modules[module].name}: ${KINDS[kind]}`, (brush) => fillCell(brush, view.modules[module], kind, 0, 0, 22, 14)];
  });
  for (const cause of view.timeline.causes) samples.push([`idle: ${cause}`, (brush) => fillIdle(brush, cause, 0, 0, 22, 14)]);
  if (view.rows.some((row) => row.critical.begin.length)) {
    samples.push(["on the critical path", (brush) => { brush.strokeStyle = style("ink"); brush.lineWidth = 1.6; brush.strokeRect(1, 1, 20, 12); }]);
  }
  const node = element("div", { class: "legend" });
  view.paintLegend = () => node.replaceChildren(...samples.map(([name, paint]) => {
    const canvas = element("canvas", { width: 22, height: 14, "aria-hidden": "true" });
    paint(canvas.getContext("2d"));
    return element("span", {}, canvas, name);
  }));
  view.paintLegend();
  return node;
}

// -- candidates ----------------------------------------------------------------------------------------------

function candidatesSection({ columns, rows, x, y, note }) {
  const chosen = (index) => {
    body.querySelectorAll("tr").forEach((row) => row.classList.toggle("chosen", row.dataset.index === `${index}`));
    points.forEach((point, i) => point?.classList.toggle("chosen", i === index));
  };
  const body = element("tbody");
  const lines = rows.map((row, index) => element("tr", { "data-index": index, onclick: () => chosen(index) },
    ...row.cells.map((cell, i) => element("td", { class: columns[i].text ? "text" : undefined }, cell,
      ...(i === columns.length - 1 && row.reason ? [element("small", {}, row.reason)] : [])))));
  body.append(...lines);
  const heads = columns.map((column, i) => element("th", { scope: "col", class: column.text ? "text" : undefined },
    element("button", { type: "button", onclick: () => sort(i) }, column.name)));
  const sort = (i) => {
    const up = heads[i].getAttribute("aria-sort") !== "ascending";
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[i].setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (line) => rows[line.dataset.index].values[i];
    const order = (a, b) => {
      const [p, q] = [value(a), value(b)];
      if (p === null || q === null) return (p === null) - (q === null);
      return (p < q ? -1 : p > q ? 1 : 0) * (up ? 1 : -1);
    };
    body.append(...lines.sort(order));
  };
  const { node, points } = scatter(rows, columns, x, y, chosen);
  main.append(element("h2", {}, "Layouts"), ...(note ? [element("p", {}, note)] : []), node,
    element("div", { class: "wide" }, element("table", {}, element("thead", {}, element("tr", {}, ...heads)), body)));
}

function scatter(rows, columns, x, y, choose) {
  const shown = rows.map((row) => (row.values[x] === null || row.values[y] === null ? null : [row.values[x], row.values[y]]));
  const known = shown.filter(Boolean);
  const frame = new Frame(columns[x].name, columns[y].name, extent(known.map((p) => p[0])), extent(known.map((p) => p[1])));
  const points = shown.map((point, index) => {
    if (!point) return null;
    const words = `${columns[x].name} ${digits(point[0])}, ${columns[y].name} ${digits(point[1])}\n${rows[index].cells[columns.length - 1]}`;
    const where = { cx: frame.x(point[0]), cy: frame.y(point[1]), r: rows[index].best ? 8 : 6 };
    const act = () => choose(index);
    const tell = (event) => { const box = event.target.getBoundingClientRect(); showTip(words, box.right, box.top); };
    return element("svg:circle", { ...where, class: "point", tabindex: 0, role: "button", "aria-label": words, fill: rows[index].best ? "#00619a" : "#aa5600",
      onclick: act, onfocus: (event) => { act(); tell(event); }, onblur: () => showTip(""), onpointerenter: tell, onpointerleave: () => showTip("") });
  });
  frame.node.append(...points.filter(Boolean));
  return { node: frame.node, points };
}

const spread = (values) => [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];

function extent(values) {
  const [low, high] = values.length ? spread(values) : [0, 1];
  const margin = (high - low) * 0.08 || Math.abs(high) * 0.1 || 1;
  return [low - margin, high + margin];
}

// -- charts --------------------------------------------------------------------------------------------------

const WIDE = 520, HIGH = 260, EDGE = { left: 62, right: 14, top: 12, bottom: 40 };

class Frame {
  constructor(across, up, [x0, x1], [y0, y1]) {
    Object.assign(this, { x0, x1, y0, y1 });
    this.node = element("svg:svg", { class: "chart", viewBox: `0 0 ${WIDE} ${HIGH}`, role: "group", "aria-label": `${up} by ${across}` });
    const box = { x: EDGE.left, y: EDGE.top, width: WIDE - EDGE.left - EDGE.right, height: HIGH - EDGE.top - EDGE.bottom };
    this.node.append(element("svg:rect", { ...box, class: "frame" }));
    for (const tick of ticks(x0, x1, 7)) this.text(digits(tick), this.x(tick), HIGH - EDGE.bottom + 15, "middle");
    for (const tick of ticks(y0, y1, 6)) {
      this.text(digits(tick), EDGE.left - 6, this.y(tick) + 4, "end");
      this.node.append(element("svg:line", { x1: EDGE.left, x2: WIDE - EDGE.right, y1: this.y(tick), y2: this.y(tick), class: "frame" }));
    }
    this.text(across, (EDGE.left + WIDE - EDGE.right) / 2, HIGH - 8, "middle");
    this.text(up, 14, HIGH / 2, "middle", `rotate(-90 14 ${HIGH / 2})`);
  }

  x(value) { return EDGE.left + ((value - this.x0) / (this.x1 - this.x0 || 1)) * (WIDE - EDGE.left - EDGE.right); }
  y(value) { return HIGH - EDGE.bottom - ((value - this.y0) / (this.y1 - this.y0 || 1)) * (HIGH - EDGE.top - EDGE.bottom); }
  text(words, x, y, anchor, transform) { this.node.append(element("svg:text", { x, y, "text-anchor": anchor, transform }, words)); }
}

const STROKES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "12 4", "4 4"];

function chart({ title, across, curves }) {
  const some = curves.filter((curve) => curve.x.length);
  if (!some.length) return element("div");
  const all = (key) => some.flatMap((curve) => curve[key]);
  const frame = new Frame(across, title, spread(all("x")), extent(all("y")));
  some.forEach((curve, i) => {
    const path = curve.x.map((at, j) => `${j ? "L" : "M"}${frame.x(at).toFixed(1)} ${frame.y(curve.y[j]).toFixed(1)}`).join("");
    if (curve.x.length === 1) frame.node.append(element("svg:circle", { cx: frame.x(curve.x[0]), cy: frame.y(curve.y[0]), r: 3, fill: STROKES[i % STROKES.length] }));
    frame.node.append(element("svg:path", { d: path, fill: "none", stroke: STROKES[i % STROKES.length], "stroke-width": 1.8, "stroke-dasharray": DASHES[i % DASHES.length] }));
    if (some.length > 1) {
      frame.node.append(element("svg:line", { x1: WIDE - 150, x2: WIDE - 122, y1: 26 + 16 * i, y2: 26 + 16 * i, stroke: STROKES[i % STROKES.length], "stroke-width": 2.5, "stroke-dasharray": DASHES[i % DASHES.length] }));
      frame.text(curve.name, WIDE - 116, 30 + 16 * i, "start");
    }
  });
  frame.node.addEventListener("pointermove", (event) => {
    const box = frame.node.getBoundingClientRect();
    const at = frame.x0 + (((event.clientX - box.left) / box.width) * WIDE - EDGE.left) / (WIDE - EDGE.left - EDGE.right) * (frame.x1 - frame.x0);
    const lines = some.map((curve) => {
      const j = curve.x.reduce((best, x, i) => (Math.abs(x - at) < Math.abs(curve.x[best] - at) ? i : best), 0);
      return `${curve.name}: ${digits(curve.y[j])} at ${across} ${curve.x[j]}`;
    });
    showTip(lines.join("\n"), event.clientX, event.clientY);
  });
  frame.node.addEventListener("pointerleave", () => showTip(""));
  return element("div", {}, element("h2", {}, title), frame.node);
}

// -- the page ------------------------------------------------------------------------------------------------

const views = [];

function build() {
  document.title = `${data.title} · mimogrid`;
  document.querySelector("h1").textContent = data.title;
  if (data.facts) main.append(element("dl", {}, ...data.facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])));
  if (data.candidates) candidatesSection(data.candidates);
  if (data.charts?.length) main.append(element("div", { class: "charts" }, ...data.charts.map(chart)));
  for (const timeline of data.timelines ?? []) views.push(timelineSection(timeline, data.world.modules));
  if (data.world) {
    const map = element("div", { class: "map", tabindex: 0, role: "img", "aria-label": "which ranks host which stages" });
    map.append(document.importNode(new DOMParser().parseFromString(data.world.map, "image/svg+xml").documentElement, true));
    main.append(element("h2", {}, `Ranks: ${data.world.ranks.toLocaleString("en")}`), map);
  }
}

function theme(name) {
  root.dataset.theme = name;
  views.forEach((view) => { view.paintLegend(); view.draw(); });
}

document.getElementById("theme").addEventListener("click", () => theme(root.dataset.theme === "dark" ? "light" : "dark"));
root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
build();
document.body.dataset.ready = "yes";
