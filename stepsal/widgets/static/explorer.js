// Draws step maps from packed buffers. The same code runs in JupyterLab, through anywidget, and in an exported page.
//
// A model has get(name), set(name, value), save_changes(), on("change:name", f), off("change:name", f). Its state:
//
//   scene    {maps: [{label, roles, texts, layers, bands, profile, token_texts, token_spans, ...}], colors, names, ...}
//   buffers  "<map>/saliency", "<map>/attention", "<map>/tokens": float32, per layer the lower triangle, row by row
//   trace, band, metric, scale, view: indices; compare: index + 1, or 0 for none; layer: position in the trace's layers;
//   slider: what the layer slider says; shared, top_k
//   pinned   [map, query step, key step] or []; zoom the same
//
// What is shown is computed as in scene.py, and called the same. Texts of traces are untrusted: they only ever become
// textContent or characters on a canvas.

const SALIENCY = 0, SHARE = 1, ATTENTION = 2, DIFFERENCE = 3; // metrics
const BANDS = ["layer", "shallow", "middle", "deep"];
const STATE = ["trace", "compare", "layer", "band", "metric", "scale", "shared", "top_k", "view", "pinned", "zoom"];
const MAP = 400, LEFT = 32, BOTTOM = 22, STRIP = 6; // CSS pixels: the map, room for labels beside and below it, roles
const SMALLEST_CELL = 2; // where a map has more steps than that leaves room for, it scrolls
const THUMB = 44, PATIENCE = 6; // pixels of a thumbnail; milliseconds for those that are not there yet
const KEPT = 6e7; // numbers that are kept for later

const packed = (n) => (n * (n + 1)) / 2;
const at = (i, j) => (i * (i + 1)) / 2 + j;
const number = (x) => (x === 0 ? "0" : Math.abs(x) >= 0.001 && Math.abs(x) < 1000 ? x.toPrecision(3) : x.toExponential(2));

function node(parent, tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = `stepsal-${name}`;
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

function floats(view) {
  if (!view) return null;
  if (view.byteOffset % 4 === 0) return new Float32Array(view.buffer, view.byteOffset, view.byteLength / 4);
  return new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

// ------------------------------------------------------------------------------------------------ what is shown

/** The maps of a scene, and what metrics make of them; results are kept. */
class Maps {
  constructor(scene, buffers) {
    this.maps = scene.maps;
    this.decades = scene.decades;
    this.data = {};
    for (const [name, view] of Object.entries(buffers)) this.data[name] = floats(view);
    this.kept = new Map();
    this.size = 0;
  }

  /** What `make` gives for a key; the oldest results are forgotten when there are too many numbers. */
  remember(key, make) {
    if (!this.kept.has(key)) {
      const made = make(), size = made.length ?? 0;
      for (const [old, value] of this.kept) {
        if (this.size + size <= KEPT) break;
        this.size -= value.length ?? 0;
        this.kept.delete(old);
      }
      this.size += size;
      this.kept.set(key, made);
    }
    return this.kept.get(key);
  }

  /** Those that are shown, side by side. */
  traces(state) {
    const one = !state.compare || state.compare - 1 === state.trace || this.metric(state.trace, state) === DIFFERENCE;
    return one ? [state.trace] : [state.trace, state.compare - 1];
  }

  /** What a trace shows: what was chosen, or saliency if it does not have that. */
  metric(map, { metric, compare }) {
    const steps = (m) => this.maps[m].roles.length;
    if (metric === ATTENTION && !this.data[`${map}/attention`]) return SALIENCY;
    if (metric === DIFFERENCE && !(compare && compare - 1 !== map && steps(compare - 1) === steps(map))) return SALIENCY;
    return metric;
  }

  /** Position of the layer with the nearest number, the lower one of two. */
  nearest(map, layer) {
    const far = this.maps[map].layers.map((x) => Math.abs(x - layer));
    return far.indexOf(Math.min(...far));
  }

  /** Number, in the model, of the layer that is chosen. */
  layer({ trace, layer }) {
    const { layers } = this.maps[trace];
    return layers[Math.min(layer, layers.length - 1)];
  }

  /** Positions of the layers that a trace shows: its own band, or its layer nearest to the chosen one. */
  chosen(map, state) {
    return state.band > 0 ? this.maps[map].bands[BANDS[state.band]] : [this.nearest(map, this.layer(state))];
  }

  shown(map, state) {
    return this.values(map, state, this.chosen(map, state));
  }

  /** The map of some layers of a trace, packed; a difference is to the other trace's band, or to its nearest layer. */
  values(map, state, positions) {
    const metric = this.metric(map, state);
    if (metric !== DIFFERENCE) return this.mean(map, metric, positions);
    const other = state.compare - 1, band = state.band > 0 && String(positions) === String(this.chosen(map, state));
    const theirs = band ? this.maps[other].bands[BANDS[state.band]] : [this.nearest(other, this.maps[map].layers[positions[0]])];
    return this.remember(["difference", map, other, positions, theirs].join("/"), () => {
      const [a, b] = [this.mean(map, SHARE, positions), this.mean(other, SHARE, theirs)];
      return a.map((x, i) => x - b[i]);
    });
  }

  mean(map, metric, positions) {
    const n = this.maps[map].roles.length, size = packed(n);
    const all = this.data[`${map}/${metric === ATTENTION ? "attention" : "saliency"}`];
    const one = (p) => all.subarray(p * size, (p + 1) * size);
    if (metric !== SHARE && positions.length === 1) return one(positions[0]);
    return this.remember(["mean", map, metric, positions].join("/"), () => {
      const mean = new Float32Array(size);
      for (const layer of positions.map(one)) for (let i = 0; i < size; i++) mean[i] += layer[i] / positions.length;
      if (metric !== SHARE) return mean;
      for (let i = 0, first = 0; i < n; first += ++i) {
        let sum = 0;
        for (let c = first; c <= first + i; c++) sum += mean[c];
        if (sum > 0) for (let c = first; c <= first + i; c++) mean[c] /= sum;
      }
      return mean;
    });
  }

  /** All that the colours of a trace depend on besides its values. */
  colouring(map, state) {
    const { compare, band, scale, shared } = state, which = band || shared ? band : `layer ${this.layer(state)}`;
    const traces = this.traces(state), metrics = traces.map((m) => this.metric(m, state));
    return [map, traces, metrics, compare, scale, shared, which].join("/");
  }

  /** Lowest and highest value of a trace's colours, which it shares with the traces that show the same metric. */
  range(map, state) {
    return this.remember(`range/${this.colouring(map, state)}`, () => {
      const metric = this.metric(map, state), shown = [];
      for (const other of this.traces(state)) {
        if (this.metric(other, state) !== metric) continue;
        if (state.band > 0 || !state.shared) shown.push(this.shown(other, state));
        if (state.shared) this.maps[other].layers.forEach((_, p) => shown.push(this.values(other, state, [p])));
      }
      const [quantile, top] = spread(shown, 0.05);
      if (metric === DIFFERENCE) return [-top || -1, top || 1];
      if (top === 0) return [0, 1];
      const floor = Math.max(quantile, top / 10 ** this.decades);
      return [state.scale === 1 ? 0 : floor < top ? floor : top / 10, top];
    });
  }

  /** Steps that a step draws on most (incoming), and that draw on it most (outgoing). */
  links(map, values, step, most) {
    const n = this.maps[map].roles.length;
    const by = (pairs) => pairs.filter(([, x]) => x !== 0).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, most);
    const incoming = [], outgoing = [];
    for (let j = 0; j < step; j++) incoming.push([j, values[at(step, j)]]);
    for (let i = step + 1; i < n; i++) outgoing.push([i, values[at(i, step)]]);
    return { incoming: by(incoming), outgoing: by(outgoing) };
  }
}

/** A quantile of the sizes that are not zero, and the largest: radix selection on the bits of float32, which sort as sizes do. */
function spread(arrays, share) {
  const counts = new Uint32Array(1 << 15), inside = [];
  const all = arrays.map((values) => new Int32Array(values.buffer, values.byteOffset, values.length));
  let zeros = 0, n = 0, top = 0;
  for (const bits of all) {
    n += bits.length;
    for (let i = 0; i < bits.length; i++) {
      const size = bits[i] & 0x7fffffff;
      counts[size >>> 16]++;
      if (size === 0) zeros++;
      if (size > top) top = size;
    }
  }
  counts[0] -= zeros;
  let left = Math.floor(share * (n - zeros)), bin = 0;
  while (bin < counts.length - 1 && left >= counts[bin]) left -= counts[bin++];
  for (const bits of all) {
    for (let i = 0; i < bits.length; i++) if ((bits[i] & 0x7fffffff) >>> 16 === bin && bits[i] << 1 !== 0) inside.push(bits[i] & 0x7fffffff);
  }
  return new Float32Array(Uint32Array.of(Uint32Array.from(inside).sort()[left] ?? 0, top).buffer);
}

/** value -> 0..255, an index of the palette. */
function shade(low, high, scale, metric) {
  const within = (x) => Math.max(0, Math.min(255, Math.round(x)));
  if (metric === DIFFERENCE) return (x) => within(127.5 + (127.5 * x) / high);
  if (scale === 1) return (x) => within((255 * x) / high);
  const bottom = Math.log(low), span = Math.log(high) - bottom || 1;
  return (x) => (x > 0 ? within((255 * (Math.log(x) - bottom)) / span) : 0);
}

/** A picture of a packed map, one pixel per cell. */
function picture(values, n, toShade, palette) {
  const canvas = new OffscreenCanvas(n, n), context = canvas.getContext("2d");
  const image = context.createImageData(n, n), pixels = new Uint32Array(image.data.buffer);
  for (let i = 0, c = 0; i < n; i++) for (let j = 0; j <= i; j++, c++) pixels[i * n + j] = palette[toShade(values[c])];
  context.putImageData(image, 0, 0);
  return canvas;
}

/** A packed map of at most so many rows: of the cells that fall together, the strongest. */
function shrunk(values, n, most) {
  if (n <= most) return [values, n];
  const small = new Float32Array(packed(most)), place = Uint16Array.from({ length: n }, (_, i) => (i * most) / n);
  for (let i = 0, c = 0; i < n; i++) {
    for (let j = 0; j <= i; j++, c++) {
      const to = at(place[i], place[j]);
      if (Math.abs(values[c]) > Math.abs(small[to])) small[to] = values[c];
    }
  }
  return [small, most];
}

function palette(rgb) {
  return Uint32Array.from({ length: 256 }, (_, i) => 0xff000000 | (rgb[3 * i + 2] << 16) | (rgb[3 * i + 1] << 8) | rgb[3 * i]);
}

function css(pixel) {
  return `rgb(${pixel & 255},${(pixel >> 8) & 255},${(pixel >> 16) & 255})`;
}

/** A canvas of so many CSS pixels, sharp on any screen; gives its drawing context. */
function sized(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const wide = Math.round(width * ratio), high = Math.round(height * ratio);
  if (canvas.width !== wide || canvas.height !== high) Object.assign(canvas, { width: wide, height: high });
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.imageSmoothingEnabled = false;
  return context;
}

// ------------------------------------------------------------------------------------------------ one trace

/** Map, read-out and text of one trace. */
class Panel {
  constructor(explorer, parent, map) {
    Object.assign(this, { explorer, map, info: explorer.maps.maps[map], hover: null, step: null, marked: [] });
    this.n = this.info.roles.length;
    this.cell = Math.max(MAP / this.n, SMALLEST_CELL);
    this.marking = () => this.mark();
    this.root = node(parent, "section", "panel");
    this.root.dataset.label = this.info.label;
    this.title = node(this.root, "div", "title");
    const columns = node(this.root, "div", "columns"), left = node(columns, "div", "left"), right = node(columns, "div", "right");
    this.buildMap(left);
    this.buildText(right);
    this.listen();
  }

  buildMap(parent) {
    this.frame = node(parent, "div", "frame");
    const whole = node(this.frame, "div", "whole"), seen = node(whole, "div", "seen");
    Object.assign(whole.style, { width: `${LEFT + this.n * this.cell}px`, height: `${this.n * this.cell + BOTTOM}px` });
    Object.assign(seen.style, { width: `${LEFT + MAP}px`, height: `${MAP + BOTTOM}px` });
    this.canvas = node(seen, "canvas", "map");
    this.overlay = node(seen, "canvas", "overlay");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application"); // it has keys of its own
    const colorbar = node(parent, "div", "colorbar");
    this.low = node(colorbar, "span", "low");
    this.bar = node(colorbar, "canvas", "bar");
    this.high = node(colorbar, "span", "high");
    this.readout = node(parent, "div", "readout");
    this.tokens = node(parent, "canvas", "tokens");
    this.tokenReadout = node(parent, "div", "token-readout");
  }

  buildText(parent) {
    this.text = node(parent, "ol", "text");
    this.text.tabIndex = 0;
    this.text.setAttribute("aria-label", `steps of ${this.info.label}`);
    this.rows = this.info.texts.map((text, i) => {
      const row = node(this.text, "li", `step stepsal-${this.info.roles[i]}`);
      row.dataset.step = i;
      node(row, "span", "number", this.info.labels[i]);
      node(row, "span", "words", text).dir = "auto";
      return row;
    });
    this.links = node(parent, "div", "links");
  }

  listen() {
    const { canvas, text } = this;
    canvas.addEventListener("pointermove", (event) => this.pointAt(event));
    canvas.addEventListener("pointerleave", () => this.leave());
    canvas.addEventListener("blur", () => this.leave());
    canvas.addEventListener("click", (event) => event.detail < 2 && this.explorer.pin(this.map, this.cellAt(event)));
    canvas.addEventListener("dblclick", (event) => this.explorer.zoom(this.map, this.cellAt(event)));
    canvas.addEventListener("keydown", (event) => this.keyOnMap(event));
    this.frame.addEventListener("scroll", () => this.explorer.schedule((this.scrolling ??= () => { this.paint(); this.mark(); })));
    const stepOf = (event) => event.target.closest(".stepsal-step")?.dataset.step;
    text.addEventListener("pointerover", (event) => stepOf(event) && this.hoverStep(Number(stepOf(event))));
    text.addEventListener("pointerleave", () => this.hoverStep(null));
    text.addEventListener("keydown", (event) => this.keyOnText(event));
    text.addEventListener("blur", () => this.hoverStep(null));
    this.tokens.addEventListener("pointermove", (event) => this.hoverToken(event));
  }

  /** Left edge of a step's column, upper edge of its row: in the canvas. */
  x(step) { return LEFT + step * this.cell - this.frame.scrollLeft; }

  y(step) { return step * this.cell - this.frame.scrollTop; }

  stepsAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const query = Math.floor((event.clientY - box.top + this.frame.scrollTop) / this.cell);
    return [query, Math.floor((event.clientX - box.left - LEFT + this.frame.scrollLeft) / this.cell)];
  }

  cellAt(event) {
    const [query, key] = this.stepsAt(event);
    return this.explorer.state.view === 0 && key >= 0 && key <= query && query < this.n ? [query, key] : null;
  }

  leave() {
    this.hoverCell(null);
    this.hoverStep(null);
  }

  pointAt(event) {
    this.readout.ariaLive = this.links.ariaLive = "off"; // a screen reader follows the keyboard, not the mouse
    if (this.explorer.state.view === 0) return this.hoverCell(this.cellAt(event));
    const step = this.stepsAt(event)[1];
    this.hoverStep(step >= 0 && step < this.n ? step : null);
  }

  keyOnMap(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    this.readout.ariaLive = this.links.ariaLive = "polite";
    const { state } = this.explorer, [query, key] = this.hover ?? this.pinned() ?? [this.n - 1, 0];
    const moves = { ArrowUp: [query - 1, key], ArrowDown: [query + 1, key], ArrowLeft: [query, key - 1], ArrowRight: [query, key + 1] };
    const actions = {
      Enter: () => this.explorer.pin(this.map, [query, key]), " ": () => this.explorer.pin(this.map, [query, key]),
      z: () => this.explorer.zoom(this.map, [query, key]),
    };
    if (event.key === "Escape") {
      this.leave();
      this.explorer.set({ pinned: [], zoom: [] });
    } else if (state.view === 0 && moves[event.key]) {
      const [q, k] = moves[event.key], inside = Math.max(0, Math.min(this.n - 1, q));
      this.hoverCell([inside, Math.max(0, Math.min(inside, k))]);
      this.frame.scrollTop += this.beyond(this.y(inside));
      this.frame.scrollLeft += this.beyond(this.x(this.hover[1]) - LEFT);
    } else if (state.view === 0 && actions[event.key]) actions[event.key]();
    else return;
    event.preventDefault();
  }

  keyOnText(event) {
    const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!by || event.ctrlKey || event.metaKey || event.altKey) return;
    this.links.ariaLive = "polite";
    this.hoverStep(Math.max(0, Math.min(this.n - 1, this.step === null ? 0 : this.step + by)));
    this.show(this.rows[this.step]);
    event.preventDefault();
  }

  /** How far to scroll until a cell is seen. */
  beyond(edge) {
    return edge < 0 ? edge : Math.max(0, edge + this.cell - MAP);
  }

  pinned() {
    const [map, query, key] = this.explorer.state.pinned;
    return map === this.map && query < this.n ? [query, key] : null;
  }

  hoverCell(cell) {
    if (String(cell) === String(this.hover)) return;
    this.hover = cell;
    this.explorer.schedule(this.marking);
  }

  hoverStep(step) {
    if (step === this.step) return;
    this.step = step;
    this.explorer.schedule(this.marking);
  }

  draw() {
    const { state, maps, scene, palettes } = this.explorer;
    const metric = maps.metric(this.map, state), positions = maps.chosen(this.map, state);
    this.values = maps.shown(this.map, state);
    const [low, high] = maps.range(this.map, state);
    const colors = palettes[metric === DIFFERENCE ? 1 : 0];
    this.picture = picture(this.values, this.n, shade(low, high, state.scale, metric), colors);
    this.paint();
    const bar = sized(this.bar, 160, 8);
    for (let x = 0; x < 160; x++) {
      bar.fillStyle = css(colors[Math.round((x / 159) * 255)]);
      bar.fillRect(x, 0, 1, 8);
    }
    this.low.textContent = number(low);
    this.high.textContent = number(high);
    const layers = positions.map((p) => this.info.layers[p]);
    const where = state.band > 0 ? `${BANDS[state.band]} layers ${layers[0]}–${layers.at(-1)}` : `layer ${layers[0]}`;
    const against = metric === DIFFERENCE ? ` − ${maps.maps[state.compare - 1].label}` : "";
    const note = metric === state.metric ? "" : ` (${scene.notes[state.metric === ATTENTION ? "attention" : "difference"]})`;
    this.title.textContent = `${this.info.label}${against} · ${where} · ${scene.names[metric]}${note}`;
    this.canvas.setAttribute("aria-label", `step map of ${this.title.textContent}; arrows move, Enter pins, z zooms into tokens`);
    this.drawTokens(positions);
    this.mark();
  }

  /** The part of the map that is seen, with the roles and numbers of its steps. */
  paint() {
    const { cell, n, frame } = this, { state, scene, style } = this.explorer;
    const context = sized(this.canvas, LEFT + MAP, MAP + BOTTOM);
    if (state.view === 1) return this.drawArcs(context);
    const side = Math.min(n, MAP / cell);
    context.drawImage(this.picture, frame.scrollLeft / cell, frame.scrollTop / cell, side, side, LEFT, 0, MAP, MAP);
    context.clearRect(0, 0, LEFT, MAP + BOTTOM);
    context.font = "9px system-ui, sans-serif";
    const every = [1, 2, 5, 10, 20, 50, 100].find((k) => k * cell >= 14) ?? 200;
    this.info.roles.forEach((role, i) => {
      const x = this.x(i), y = this.y(i), named = role === "thinking" ? i % every === 0 : role !== this.info.roles[i - 1];
      context.fillStyle = scene.colors[role];
      if (y > -cell && y < MAP) context.fillRect(LEFT - STRIP - 2, y, STRIP, Math.ceil(cell));
      if (x > LEFT - cell && x < LEFT + MAP) context.fillRect(x, MAP + 2, Math.ceil(cell), STRIP);
      context.fillStyle = style.ink;
      if (!named) return;
      context.textAlign = "right";
      if (y >= 0 && y < MAP) context.fillText(this.info.labels[i], LEFT - STRIP - 5, y + Math.min(cell, 14) / 2 + 4);
      context.textAlign = "center";
      if (x >= LEFT && x < LEFT + MAP) context.fillText(this.info.labels[i], x + cell / 2, MAP + BOTTOM - 4);
    });
  }

  strongest(query, most) {
    return this.explorer.maps.links(this.map, this.values, query, most).incoming;
  }

  drawArcs(context) {
    const base = MAP - 30;
    this.sums = Array.from({ length: this.n }, (_, i) => {
      let sum = 0;
      for (let j = 0; j <= i; j++) sum += Math.abs(this.values[at(i, j)]);
      return sum || 1;
    });
    for (let i = 0; i < this.n; i++) {
      for (const [j, value] of this.strongest(i, Math.max(1, this.explorer.state.top_k))) this.arc(context, i, j, value, this.explorer.scene.colors[this.info.roles[j]]);
    }
    context.globalAlpha = 1;
    this.info.roles.forEach((role, i) => {
      context.fillStyle = this.explorer.scene.colors[role];
      context.beginPath();
      context.arc(this.x(i) + this.cell / 2, base, Math.min(4, Math.max(1.2, this.cell * 0.3)), 0, 7);
      context.fill();
    });
  }

  /** From the key step to the query step that uses it, as in `stepsal.plots.flow_arcs`: half of a row is full strength. */
  arc(context, query, key, value, color) {
    const base = MAP - 30, strength = Math.sqrt(Math.min(1, Math.abs(value) / this.sums[query] / 0.5));
    const height = ((query - key) / Math.max(1, this.n - 1)) ** 0.7 * (4 / 3) * (base - 10);
    const [from, to] = [key, query].map((step) => this.x(step) + this.cell / 2);
    context.strokeStyle = color;
    context.globalAlpha = 0.12 + 0.78 * strength;
    context.lineWidth = 0.4 + Math.min(2.4, Math.max(0.6, this.cell / 4)) * strength;
    context.beginPath();
    context.moveTo(from, base);
    context.bezierCurveTo(from, base - height, to, base - height, to, base);
    context.stroke();
  }

  /** Hover, pin and top-k marks, and all that tells about them. */
  mark() {
    const { state, maps, style } = this.explorer;
    const context = sized(this.overlay, LEFT + MAP, MAP + BOTTOM);
    const cell = this.hover ?? this.pinned(), step = this.step, about = step ?? cell?.[0] ?? null;
    const links = about === null ? null : maps.links(this.map, this.values, about, Math.max(3, state.top_k));
    context.save();
    context.beginPath();
    context.rect(LEFT, 0, MAP, MAP);
    context.clip();
    if (state.view === 0) this.markCells(context, cell, step);
    else if (links) {
      for (const [i, x] of links.incoming) this.arc(context, about, i, x, style.accent);
      for (const [i, x] of links.outgoing) this.arc(context, i, about, x, style.accent);
    }
    context.restore();
    for (const row of this.marked) row.classList.remove("stepsal-query", "stepsal-key", "stepsal-hovered");
    this.marked = [...(cell ?? []), ...(step === null ? [] : [step])].map((i) => this.rows[i]);
    if (cell) {
      this.rows[cell[0]].classList.add("stepsal-query");
      this.rows[cell[1]].classList.add("stepsal-key");
      if (!this.text.matches(":hover, :focus")) this.show(this.rows[cell[0]]);
    }
    if (step !== null) this.rows[step].classList.add("stepsal-hovered");
    this.readout.textContent = cell ? this.tell(cell) : "";
    this.links.replaceChildren();
    if (!links) return;
    for (const [way, verb] of [["incoming", "draws on"], ["outgoing", "is drawn on by"]]) {
      const list = node(this.links, "div", way, `${this.info.labels[about]} ${verb} `);
      node(list, "b", "", links[way].map(([i, x]) => `${this.info.labels[i]} (${number(x)})`).join(", ") || "nothing");
    }
  }

  markCells(context, cell, step) {
    const { state, style } = this.explorer, size = this.cell;
    const box = ([query, key], width) => {
      context.lineWidth = width;
      context.strokeRect(this.x(key), this.y(query), size, size);
    };
    context.strokeStyle = context.fillStyle = style.accent;
    context.globalAlpha = 0.55;
    for (let i = 1; state.top_k > 0 && i < this.n; i++) {
      for (const [j] of this.strongest(i, state.top_k)) {
        if (size > 4) box([i, j], 1);
        else context.fillRect(this.x(j) - 0.5, this.y(i) - 0.5, size + 1, size + 1); // too small for a frame
      }
    }
    const row = step ?? cell?.[0], column = step ?? cell?.[1];
    context.lineWidth = 1;
    for (const band of row === undefined ? [] : [
      [this.x(0), this.y(row), (row + 1) * size, size], [this.x(column), this.y(column), size, (this.n - column) * size],
    ]) {
      context.globalAlpha = 0.18;
      context.fillRect(...band);
      context.globalAlpha = 1;
      context.strokeRect(...band);
    }
    if (this.pinned()) box(this.pinned(), 2.5);
    if (this.hover) box(this.hover, 1.2);
  }

  show(row) {
    const top = row.offsetTop - this.text.offsetTop, seen = this.text.scrollTop;
    if (top < seen || top + row.offsetHeight > seen + this.text.clientHeight) {
      this.text.scrollTop = top - this.text.clientHeight / 3;
    }
  }

  tell([query, key]) {
    const value = this.values[at(query, key)];
    let rank = 1;
    for (let j = 0; j <= query; j++) if (Math.abs(this.values[at(query, j)]) > Math.abs(value)) rank++;
    const { labels, roles } = this.info;
    return `step ${labels[query]} (${roles[query]}) ← ${labels[key]} (${roles[key]}): ${number(value)}, rank ${rank} of ${query + 1}`;
  }

  /** Token spans of the zoomed cell. */
  block() {
    const [map, query, key] = this.explorer.state.zoom;
    return map === this.map && query < this.n ? [this.info.token_spans[query], this.info.token_spans[key]] : null;
  }

  drawTokens(positions) {
    const all = this.explorer.maps.data[`${this.map}/tokens`], spans = all && this.block();
    this.tokens.hidden = this.tokenReadout.hidden = !spans;
    if (!spans) return;
    const [[q0, q1], [k0, k1]] = spans, size = packed(this.info.token_texts.length);
    const rows = q1 - q0, columns = k1 - k0, values = new Float32Array(rows * columns);
    for (let i = 0; i < rows; i++) {
      for (let j = 0; j < columns && k0 + j <= q0 + i; j++) {
        for (const p of positions) values[i * columns + j] += all[p * size + at(q0 + i, k0 + j)] / positions.length;
      }
    }
    this.blockValues = values;
    const top = values.reduce((a, b) => Math.max(a, b), 0) || 1, toShade = shade(top / 1000, top, this.explorer.state.scale, 0);
    const pixel = Math.max(2, Math.min(16, Math.floor(MAP / Math.max(rows, columns))));
    const context = sized(this.tokens, columns * pixel, rows * pixel);
    for (let i = 0; i < rows; i++) {
      for (let j = 0; j < columns && k0 + j <= q0 + i; j++) {
        context.fillStyle = css(this.explorer.palettes[0][toShade(values[i * columns + j])]);
        context.fillRect(j * pixel, i * pixel, pixel, pixel);
      }
    }
    this.tokens.dataset.shape = `${rows}x${columns}`;
    const [query, key] = this.explorer.state.zoom.slice(1).map((step) => this.info.labels[step]);
    this.tokenReadout.textContent = `tokens of step ${query} (rows) on those of ${key} (columns); Esc closes`;
  }

  hoverToken(event) {
    const spans = this.block();
    if (!spans) return;
    const [[q0, q1], [k0, k1]] = spans, box = this.tokens.getBoundingClientRect();
    const i = Math.floor(((event.clientY - box.top) / box.height) * (q1 - q0));
    const j = Math.floor(((event.clientX - box.left) / box.width) * (k1 - k0));
    if (i < 0 || j < 0 || i >= q1 - q0 || j >= k1 - k0) return;
    const [query, key] = [q0 + i, k0 + j].map((t) => JSON.stringify(this.info.token_texts[t]));
    this.tokenReadout.textContent = `${query} ← ${key}: ${number(this.blockValues[i * (k1 - k0) + j])}`;
  }
}

// ------------------------------------------------------------------------------------------------ the whole

class Explorer {
  constructor(el, model) {
    Object.assign(this, { model, scene: model.get("scene"), waiting: new Set(), frame: 0, controls: {}, shown: "" });
    this.maps = new Maps(this.scene, model.get("buffers"));
    this.palettes = this.scene.palettes.map(palette);
    this.root = node(el, "div", "explorer");
    this.root.dataset.lmSuppressShortcuts = "true"; // JupyterLab's own meaning of arrows and Enter
    if (model.get("controls")) this.buildControls();
    this.panels = node(this.root, "div", "panels");
    const depth = node(this.root, "div", "depth");
    this.profile = node(depth, "canvas", "profile");
    this.profile.setAttribute("role", "img");
    this.profile.setAttribute("aria-label", "profile by layer; click chooses a layer");
    this.profileKey = node(depth, "div", "profile-key");
    this.thumbs = node(depth, "div", "all-layers");
    node(this.root, "div", "help", "On the map: arrows move, Enter or click pins, z or double click zooms into tokens, Esc clears. [ and ] change the layer.");
    this.profile.addEventListener("click", (event) => this.chooseLayer(this.layerAt(event.offsetX)));
    this.root.addEventListener("keydown", (event) => {
      const { state } = this, step = { "[": -1, "]": 1 }[event.key];
      const { layers } = this.maps.maps[state.trace], next = Math.min(state.layer, layers.length - 1) + step;
      if (step && next >= 0 && next < layers.length) this.set({ layer: next, band: 0 });
    });
    this.drawing = () => this.draw();
    this.changed = () => this.schedule(this.drawing);
    STATE.forEach((name) => model.on(`change:${name}`, this.changed));
    // The slider follows the layer; when it is moved by hand, the reader wants to see that layer and not the band.
    this.followed = () => this.set({ slider: this.state.layer });
    this.slid = () => model.get("slider") !== model.get("layer") && this.set({ layer: model.get("slider"), band: 0 });
    model.on("change:layer", this.followed);
    model.on("change:slider", this.slid);
    this.draw();
    // at first, when the page around has its place and its colours; then when there is room for more or less
    this.perRow = 0;
    this.resized = new ResizeObserver(() => this.thumbsPerRow() !== this.perRow && this.changed());
    this.resized.observe(this.root);
    this.darkness = matchMedia("(prefers-color-scheme: dark)"); // canvases don't follow a theme by themselves
    this.darkness.addEventListener("change", this.changed);
    this.themed = new MutationObserver(this.changed);
    this.themed.observe(document.body, { attributeFilter: ["class", "data-jp-theme-name", "data-vscode-theme-kind"] });
  }

  get state() {
    return Object.fromEntries(STATE.map((name) => [name, this.model.get(name)]));
  }

  set(choices) {
    for (const [name, value] of Object.entries(choices)) this.model.set(name, value);
    this.model.save_changes();
  }

  pin(map, cell) {
    if (!cell) return;
    const next = [map, ...cell];
    this.set({ pinned: String(next) === String(this.state.pinned) ? [] : next });
  }

  zoom(map, cell) {
    if (cell && this.maps.data[`${map}/tokens`]) this.set({ zoom: [map, ...cell], pinned: [map, ...cell] });
  }

  /** Show a layer, given by its number in the model: the nearest that there is. */
  chooseLayer(layer) {
    this.set({ layer: this.maps.nearest(this.state.trace, layer), band: 0 });
  }

  /** Run once before the next paint, however often it is asked for; then say so. */
  schedule(work) {
    this.waiting.add(work);
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      const todo = [...this.waiting];
      this.waiting.clear();
      this.frame = 0;
      for (const each of todo) each();
      this.root.dispatchEvent(new CustomEvent("stepsal-painted", { bubbles: true }));
    });
  }

  draw() {
    const traces = this.maps.traces(this.state), style = getComputedStyle(this.root);
    this.style = { ink: style.color, accent: style.getPropertyValue("--stepsal-accent").trim() || "#009E73" };
    if (String(traces) !== this.shown) {
      this.shown = String(traces);
      this.panels.replaceChildren();
      this.each = traces.map((map) => new Panel(this, this.panels, map));
      this.prepare(traces);
    }
    for (const panel of this.each) panel.draw();
    this.drawProfile();
    this.drawThumbs();
    this.syncControls();
  }

  /** While nothing else is to be done: the shares of all layers, which the first switch to them would wait for. */
  prepare(traces) {
    const waiting = traces.flatMap((map) => this.maps.maps[map].layers.map((_, p) => [map, p]));
    const few = waiting.reduce((n, [map]) => n + packed(this.maps.maps[map].roles.length), 0) < KEPT / 4;
    const work = (deadline) => {
      while (waiting.length && deadline.timeRemaining() > 3) {
        const [map, p] = waiting.pop();
        this.maps.mean(map, SHARE, [p]);
      }
      if (waiting.length) this.idle = requestIdleCallback(work);
    };
    window.cancelIdleCallback?.(this.idle);
    if (few) this.idle = window.requestIdleCallback?.(work);
  }

  /** Middle of a layer in the profile, by its number in the model; and the reverse. */
  layerX(layer) { return 30 + (layer + 0.5) * this.layerWidth(); }

  layerAt(x) { return Math.floor((x - 30) / this.layerWidth()); }

  layerWidth() { return 400 / (1 + Math.max(...this.maps.traces(this.state).flatMap((map) => this.maps.maps[map].layers))); }

  drawProfile() {
    const height = 96, context = sized(this.profile, 440, height), { state, maps, style } = this;
    const lines = maps.traces(state).flatMap((map, k) =>
      Object.keys(this.scene.lines).map((name) => [maps.maps[map], k, name, maps.maps[map].profile[name]]));
    const values = lines.flatMap(([, , , ys]) => ys.filter((y) => y !== null));
    const { layers } = maps.maps[state.trace], chosen = maps.chosen(state.trace, state).map((p) => layers[p]);
    this.profile.dataset.layers = chosen.join(" ");
    this.profileKey.replaceChildren();
    if (!values.length) return;
    const low = Math.min(0, ...values), high = Math.max(...values, low + 1e-6), wide = this.layerWidth();
    const y = (v) => height - 14 - ((v - low) / (high - low)) * (height - 24);
    context.fillStyle = style.accent;
    context.globalAlpha = 0.25;
    for (const layer of chosen) context.fillRect(this.layerX(layer) - wide / 2, 4, wide, height - 16);
    context.globalAlpha = 1;
    context.fillStyle = style.ink;
    context.font = "9px system-ui, sans-serif";
    context.fillText(high.toFixed(2), 2, y(high) + 4);
    context.fillText(low > -0.005 ? "0" : low.toFixed(2), 2, y(low) + 2);
    context.textAlign = "center";
    for (const layer of new Set([layers[0], layers.at(-1), ...chosen])) context.fillText(layer, this.layerX(layer), height - 2);
    context.fillText("layer", 18, height - 2);
    for (const [map, k, name, ys] of lines) {
      context.strokeStyle = this.scene.lines[name];
      context.setLineDash(k ? [4, 3] : []);
      context.lineWidth = 1.6;
      context.beginPath();
      ys.forEach((v, p) => v !== null && context[p && ys[p - 1] !== null ? "lineTo" : "moveTo"](this.layerX(map.layers[p]), y(v)));
      context.stroke();
      const whose = lines.length > Object.keys(this.scene.lines).length ? `, ${map.label}` : "";
      const label = node(this.profileKey, "span", "line", `${this.scene.line_names[name]}${whose}`);
      label.style.setProperty("--stepsal-line", this.scene.lines[name]);
      label.classList.toggle("stepsal-dashed", k > 0);
    }
  }

  thumbsPerRow() {
    return Math.max(1, Math.floor((this.root.clientWidth || 900) / (THUMB + 4)));
  }

  /** Those that take long are left for after the paint that the reader waits for. */
  drawThumbs() {
    const traces = this.maps.traces(this.state), until = performance.now() + PATIENCE;
    this.perRow = this.thumbsPerRow();
    if (this.thumbs.dataset.traces !== String(traces)) {
      this.thumbs.dataset.traces = String(traces);
      this.thumbs.replaceChildren();
      for (const map of traces) {
        if (traces.length > 1) node(this.thumbs, "div", "thumbs-of", this.maps.maps[map].label);
        const canvas = node(this.thumbs, "canvas", "thumbs"), each = THUMB + 4;
        canvas.setAttribute("role", "img");
        canvas.setAttribute("aria-label", "maps of all layers; click chooses a layer");
        canvas.addEventListener("click", (event) => {
          const column = Math.min(this.perRow - 1, Math.floor(event.offsetX / each));
          const layer = this.maps.maps[map].layers[Math.floor(event.offsetY / (each + 10)) * this.perRow + column];
          if (layer !== undefined) this.chooseLayer(layer);
        });
      }
    }
    const canvases = this.thumbs.querySelectorAll("canvas");
    const missing = traces.map((map, k) => this.drawThumbsOf(map, canvases[k], until));
    clearTimeout(this.later);
    if (missing.some(Boolean)) this.later = setTimeout(() => this.drawThumbs());
  }

  drawThumbsOf(map, canvas, until) {
    const { state, maps } = this, { accent, ink } = this.style, { layers, roles } = maps.maps[map];
    const each = THUMB + 4, row = this.perRow, metric = maps.metric(map, state), chosen = new Set(maps.chosen(map, state));
    const context = sized(canvas, Math.min(layers.length, row) * each, Math.ceil(layers.length / row) * (each + 10));
    context.font = "9px system-ui, sans-serif";
    let missing = 0;
    layers.forEach((name, p) => {
      const left = (p % row) * each + 2, top = Math.floor(p / row) * (each + 10) + 2;
      const alone = { ...state, band: 0, trace: map, layer: p }; // how this layer would look if it were chosen
      const range = state.shared ? maps.range(map, state) : maps.range(map, alone);
      const key = ["thumb", map, p, metric, state.compare, state.scale, range].join("/");
      const small = performance.now() < until || maps.kept.has(key) ? maps.remember(key, () => {
        const [values, n] = shrunk(maps.values(map, alone, [p]), roles.length, 2 * THUMB);
        return picture(values, n, shade(...range, state.scale, metric), this.palettes[metric === DIFFERENCE ? 1 : 0]);
      }) : null;
      if (small) context.drawImage(small, left, top, THUMB, THUMB);
      else missing++;
      context.strokeStyle = chosen.has(p) ? accent : "rgba(128,128,128,.4)";
      context.lineWidth = chosen.has(p) ? 2.5 : 0.5;
      context.strokeRect(left, top, THUMB, THUMB);
      context.fillStyle = ink;
      context.fillText(String(name), left + 1, top + each + 5);
    });
    canvas.dataset.drawn = layers.length - missing;
    return missing;
  }

  // Controls of the exported page; in JupyterLab ipywidgets take their place.
  buildControls() {
    const bar = node(this.root, "div", "controls"), { maps } = this.maps;
    const field = (name, label, input) => {
      node(bar, "label", "control", `${label} `).append(input);
      input.classList.add(`stepsal-control-${name.replace("_", "-")}`);
      this.controls[name] = input;
    };
    const select = (name, label, options) => {
      const input = document.createElement("select");
      options.forEach((text, i) => { node(input, "option", "", text).value = i; });
      input.addEventListener("change", () => this.set({ [name]: Number(input.value) }));
      field(name, label, input);
    };
    const range = (name, label, max) => {
      const input = Object.assign(document.createElement("input"), { type: "range", min: 0, max, step: 1 });
      input.addEventListener("input", () => this.set({ [name]: Number(input.value) }));
      field(name, label, input);
    };
    range("slider", "layer", Math.max(...maps.map((m) => m.layers.length)) - 1);
    const play = node(bar, "button", "play", "▶");
    play.type = "button";
    play.title = "play through the layers";
    play.addEventListener("click", () => {
      if (this.timer) this.timer = clearInterval(this.timer);
      else this.timer = setInterval(() => this.set({ slider: (this.state.layer + 1) % this.maps.maps[this.state.trace].layers.length }), 400);
      play.textContent = this.timer ? "■" : "▶";
    });
    select("band", "band", ["one layer", ...BANDS.slice(1)]);
    if (maps.length > 1) {
      select("trace", "trace", maps.map((m) => m.label));
      select("compare", "beside", ["nothing", ...maps.map((m) => m.label)]);
    }
    select("metric", "metric", this.scene.names);
    select("scale", "scale", ["log", "linear"]);
    const shared = Object.assign(document.createElement("input"), { type: "checkbox" });
    shared.addEventListener("change", () => this.set({ shared: shared.checked }));
    field("shared", "one scale for all layers", shared);
    range("top_k", "links", 5);
    select("view", "view", ["map", "arcs"]);
  }

  syncControls() {
    for (const [name, input] of Object.entries(this.controls)) {
      if (input.type === "checkbox") input.checked = this.model.get(name);
      else input.value = String(this.model.get(name));
    }
  }

  close() {
    STATE.forEach((name) => this.model.off(`change:${name}`, this.changed));
    this.model.off("change:layer", this.followed);
    this.model.off("change:slider", this.slid);
    clearInterval(this.timer);
    clearTimeout(this.later);
    window.cancelIdleCallback?.(this.idle);
    cancelAnimationFrame(this.frame);
    this.resized.disconnect();
    this.themed.disconnect();
    this.darkness.removeEventListener("change", this.changed);
  }
}

function render({ model, el }) {
  const explorer = new Explorer(el, model);
  return () => explorer.close();
}

export default { render };
