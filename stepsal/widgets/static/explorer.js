// Draws step maps from packed buffers. The same code runs in JupyterLab, through anywidget, and in an exported page.
//
// A model has get(name), set(name, value), save_changes(), on("change:name", f), off("change:name", f). Its state:
//
//   scene    {maps: [{label, roles, texts, layers, n_layers, profile, token_texts, token_spans, ...}], colors}
//   buffers  "<map>/saliency", "<map>/attention", "<map>/tokens": float32, per layer the lower triangle, row by row
//   trace, compare (-1: none), layer (position in layers), band, metric, scale, view: indices; shared, top_k
//   pinned   [map, query step, key step] or []; zoom the same
//
// Texts of traces are untrusted: they only ever become textContent or characters on a canvas.

const METRICS = ["saliency", "share", "attention", "difference"];
const BANDS = ["layer", "shallow", "middle", "deep"];
const SHORT = { question: "Q", thinking: "T", summary: "S" };
const STATE = ["trace", "compare", "layer", "band", "metric", "scale", "shared", "top_k", "view", "pinned", "zoom"];
const MAP = 400, STRIP = 10, THUMB = 44;

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
    this.data = {};
    for (const [name, view] of Object.entries(buffers)) this.data[name] = floats(view);
    this.kept = new Map();
  }

  remember(key, make) {
    if (!this.kept.has(key)) {
      if (this.kept.size > 400) this.kept.delete(this.kept.keys().next().value);
      this.kept.set(key, make());
    }
    return this.kept.get(key);
  }

  /** Positions of the layers that are shown: one, or a band. */
  positions(map, layer, band) {
    const { layers, bands } = this.maps[map];
    if (band > 0) return bands[BANDS[band]];
    return [Math.min(layer, layers.length - 1)];
  }

  has(map, metric, compare) {
    if (metric === 2) return Boolean(this.data[`${map}/attention`]);
    if (metric === 3) return compare >= 0 && this.maps[map].roles.length === this.maps[compare].roles.length;
    return true;
  }

  /** The shown map, packed: the mean over layers of what the metric says. */
  values(map, metric, compare, positions) {
    return this.remember([map, metric, compare, positions].join("/"), () => {
      if (metric === 3) {
        const [a, b] = [map, compare].map((m) => this.values(m, 1, -1, this.within(m, positions)));
        return a.map((x, i) => x - b[i]);
      }
      const n = this.maps[map].roles.length, size = packed(n);
      const all = this.data[`${map}/${metric === 2 ? "attention" : "saliency"}`];
      const mean = new Float32Array(size);
      for (const p of positions) {
        for (let i = 0; i < size; i++) mean[i] += all[p * size + i] / positions.length;
      }
      if (metric !== 1) return mean;
      for (let i = 0; i < n; i++) {
        let sum = 0;
        for (let j = 0; j <= i; j++) sum += mean[at(i, j)];
        if (sum > 0) for (let j = 0; j <= i; j++) mean[at(i, j)] /= sum;
      }
      return mean;
    });
  }

  within(map, positions) {
    return positions.map((p) => Math.min(p, this.maps[map].layers.length - 1));
  }

  /** Lowest and highest value of the colours: of one map, or of all layers of the traces shown. */
  range(traces, metric, compare, positions, scale, shared) {
    const sets = shared ? this.maps[traces[0]].layers.map((_, p) => [p]) : [positions];
    return this.remember(["range", traces, metric, compare, sets.length, shared ? "" : positions, scale].join("/"), () => {
      let top = 0, low = Infinity;
      const counts = new Uint32Array(2048); // of binary logarithms, 16 bins each
      for (const trace of traces) {
        for (const set of sets) {
          for (const x of this.values(trace, metric, compare, this.within(trace, set))) {
            const size = Math.abs(x);
            if (size > top) top = size;
            if (size > 0) {
              if (size < low) low = size;
              counts[Math.max(0, Math.min(2047, Math.floor((Math.log2(size) + 100) * 16)))]++;
            }
          }
        }
      }
      if (metric === 3) return [-top || -1, top || 1];
      if (!(top > 0)) return [0, 1];
      if (scale === 1) return [0, top];
      let left = counts.reduce((a, b) => a + b, 0) * 0.05, bin = 0; // the colours begin at the 5 % quantile
      while ((left -= counts[bin]) > 0) bin++;
      const floor = 2 ** (bin / 16 - 100);
      return [floor < top ? Math.max(floor, low) : top / 10, top];
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

/** value -> 0..255, or -1 where there is nothing. */
function shade(low, high, scale, metric) {
  if (metric === 3) return (x) => Math.round(127.5 + (127.5 * x) / high);
  if (scale === 1) return (x) => Math.round((255 * x) / high);
  const bottom = Math.log(low), span = Math.log(high) - bottom || 1;
  return (x) => (x > 0 ? Math.max(0, Math.min(255, Math.round((255 * (Math.log(x) - bottom)) / span))) : 0);
}

/** A picture of a packed map, one pixel per cell. */
function picture(values, n, toShade, palette) {
  const canvas = new OffscreenCanvas(n, n), context = canvas.getContext("2d");
  const image = context.createImageData(n, n), pixels = new Uint32Array(image.data.buffer);
  for (let i = 0, c = 0; i < n; i++) for (let j = 0; j <= i; j++, c++) pixels[i * n + j] = palette[toShade(values[c])];
  context.putImageData(image, 0, 0);
  return canvas;
}

function palette(rgb) {
  return Uint32Array.from({ length: 256 }, (_, i) => 0xff000000 | (rgb[3 * i + 2] << 16) | (rgb[3 * i + 1] << 8) | rgb[3 * i]);
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
    Object.assign(this, { explorer, map, info: explorer.maps.maps[map], hover: null, step: null });
    this.n = this.info.roles.length;
    this.marking = () => this.mark();
    this.root = node(parent, "section", "panel");
    this.root.dataset.label = this.info.label;
    this.title = node(this.root, "div", "title", this.info.label);
    const columns = node(this.root, "div", "columns");
    const left = node(columns, "div", "left");
    this.frame = node(left, "div", "frame");
    this.canvas = node(this.frame, "canvas", "map");
    this.overlay = node(this.frame, "canvas", "overlay");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.colorbar = node(left, "div", "colorbar");
    this.low = node(this.colorbar, "span", "low");
    this.bar = node(this.colorbar, "canvas", "bar");
    this.high = node(this.colorbar, "span", "high");
    this.readout = node(left, "div", "readout");
    this.readout.setAttribute("aria-live", "polite");
    this.tokens = node(left, "canvas", "tokens");
    this.tokenReadout = node(left, "div", "token-readout");
    const right = node(columns, "div", "right");
    this.text = node(right, "ol", "text");
    this.rows = this.info.texts.map((text, i) => {
      const row = node(this.text, "li", `step stepsal-${this.info.roles[i]}`);
      row.dataset.step = i;
      node(row, "span", "number", this.info.labels[i]);
      const words = node(row, "span", "words", text);
      words.dir = "auto";
      return row;
    });
    this.links = node(right, "div", "links");
    this.listen();
  }

  listen() {
    this.canvas.addEventListener("pointermove", (event) => this.hoverCell(this.cellAt(event)));
    this.canvas.addEventListener("pointerleave", () => this.hoverCell(null));
    this.canvas.addEventListener("click", (event) => this.explorer.pin(this.map, this.cellAt(event)));
    this.canvas.addEventListener("dblclick", (event) => this.explorer.zoom(this.map, this.cellAt(event)));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    const stepOf = (event) => event.target.closest(".stepsal-step")?.dataset.step;
    this.text.addEventListener("pointerover", (event) => stepOf(event) && this.hoverStep(Number(stepOf(event))));
    this.text.addEventListener("pointerleave", () => this.hoverStep(null));
    this.tokens.addEventListener("pointermove", (event) => this.hoverToken(event));
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const query = Math.floor(((event.clientY - box.top) / MAP) * this.n);
    const key = Math.floor(((event.clientX - box.left - STRIP) / MAP) * this.n);
    if (this.explorer.state.view === 1) return null;
    return key >= 0 && key <= query && query < this.n ? [query, key] : null;
  }

  key(event) {
    const [query, key] = this.hover ?? this.pinned() ?? [this.n - 1, 0];
    const moves = { ArrowUp: [query - 1, key], ArrowDown: [query + 1, key], ArrowLeft: [query, key - 1], ArrowRight: [query, key + 1] };
    const actions = {
      Enter: () => this.explorer.pin(this.map, [query, key]), " ": () => this.explorer.pin(this.map, [query, key]),
      Escape: () => this.explorer.set({ pinned: [], zoom: [] }), z: () => this.explorer.zoom(this.map, [query, key]),
    };
    if (moves[event.key]) {
      const [q, k] = moves[event.key];
      const inside = Math.max(0, Math.min(this.n - 1, q));
      this.hoverCell([inside, Math.max(0, Math.min(inside, k))]);
    } else if (actions[event.key]) actions[event.key]();
    else return;
    event.preventDefault();
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
    const shown = maps.has(this.map, state.metric, state.compare);
    this.frame.classList.toggle("stepsal-empty", !shown);
    const metric = shown ? state.metric : 0;
    const positions = maps.positions(this.map, state.layer, state.band);
    this.values = maps.values(this.map, metric, state.compare, positions);
    const traces = metric === 3 ? [this.map] : this.explorer.shownTraces();
    const [low, high] = maps.range(traces, metric, state.compare, positions, state.scale, state.shared);
    const colors = palettes[metric === 3 ? 1 : 0], toShade = shade(low, high, state.scale, metric);
    const context = sized(this.canvas, MAP + STRIP, MAP + STRIP);
    const cell = MAP / this.n;
    if (state.view === 1) this.drawArcs(context);
    else {
      context.drawImage(picture(this.values, this.n, toShade, colors), STRIP, 0, MAP, MAP);
      this.info.roles.forEach((role, i) => {
        context.fillStyle = scene.colors[role];
        context.fillRect(0, i * cell, STRIP - 3, Math.ceil(cell));
        context.fillRect(STRIP + i * cell, MAP + 3, Math.ceil(cell), STRIP - 3);
      });
    }
    const bar = sized(this.bar, 160, 8);
    for (let x = 0; x < 160; x++) {
      const c = colors[Math.round((x / 159) * 255)];
      bar.fillStyle = `rgb(${c & 255},${(c >> 8) & 255},${(c >> 16) & 255})`;
      bar.fillRect(x, 0, 1, 8);
    }
    this.low.textContent = number(low);
    this.high.textContent = number(high);
    const layers = positions.map((p) => this.info.layers[p]);
    const where = state.band > 0 ? `${BANDS[state.band]} layers ${layers[0]}–${layers.at(-1)}` : `layer ${layers[0]}`;
    const against = metric === 3 ? ` − ${maps.maps[state.compare].label}` : "";
    const missing = shown ? "" : ` (no ${METRICS[state.metric]} here: saliency)`;
    this.title.textContent = `${this.info.label}${against} · ${where} · ${scene.names[metric]}${missing}`;
    this.canvas.setAttribute("aria-label", `step map of ${this.title.textContent}; arrows move, Enter pins, z zooms`);
    this.drawTokens(positions);
    this.mark();
  }

  strongest(query, most) {
    return this.explorer.maps.links(this.map, this.values, query, most).incoming;
  }

  drawArcs(context) {
    const { state, scene } = this.explorer, gap = MAP / this.n, base = MAP - 30;
    const sums = Array.from({ length: this.n }, (_, i) => {
      let sum = 0;
      for (let j = 0; j <= i; j++) sum += Math.abs(this.values[at(i, j)]);
      return sum || 1;
    });
    const x = (i) => STRIP + (i + 0.5) * gap;
    for (let i = 0; i < this.n; i++) {
      for (const [j, value] of this.strongest(i, Math.max(1, state.top_k))) {
        const strength = Math.sqrt(Math.min(1, Math.abs(value) / sums[i] / 0.5));
        context.strokeStyle = scene.colors[this.info.roles[j]];
        context.globalAlpha = 0.12 + 0.78 * strength;
        context.lineWidth = 0.4 + Math.min(2.4, Math.max(0.6, gap / 4)) * strength;
        const height = ((i - j) / Math.max(1, this.n - 1)) ** 0.7 * (4 / 3) * (base - 10);
        context.beginPath();
        context.moveTo(x(j), base);
        context.bezierCurveTo(x(j), base - height, x(i), base - height, x(i), base);
        context.stroke();
      }
    }
    context.globalAlpha = 1;
    this.info.roles.forEach((role, i) => {
      context.fillStyle = scene.colors[role];
      context.beginPath();
      context.arc(x(i), base, Math.min(4, Math.max(1.2, gap * 0.3)), 0, 7);
      context.fill();
    });
  }

  /** Hover, pin and top-k marks, and all that tells about them. */
  mark() {
    const { state, maps } = this.explorer;
    const context = sized(this.overlay, MAP + STRIP, MAP + STRIP), size = MAP / this.n;
    const ink = getComputedStyle(this.root).getPropertyValue("--stepsal-accent").trim() || "#009E73";
    const box = ([query, key], width) => {
      context.lineWidth = width;
      context.strokeRect(STRIP + key * size, query * size, Math.max(2, size), Math.max(2, size));
    };
    const cell = this.hover ?? this.pinned(), step = this.step;
    if (state.view === 0) {
      context.strokeStyle = ink;
      if (state.top_k > 0 && size > 3) {
        context.globalAlpha = 0.55;
        for (let i = 1; i < this.n; i++) for (const [j] of this.strongest(i, state.top_k)) box([i, j], 1);
        context.globalAlpha = 1;
      }
      context.fillStyle = ink;
      context.globalAlpha = 0.18;
      for (const i of step !== null ? [step] : cell ? [cell[0]] : []) context.fillRect(STRIP, i * size, (i + 1) * size, Math.max(1, size));
      for (const j of step !== null ? [step] : cell ? [cell[1]] : []) context.fillRect(STRIP + j * size, j * size, Math.max(1, size), MAP - j * size);
      context.globalAlpha = 1;
      if (this.pinned()) box(this.pinned(), 2.5);
      if (this.hover) box(this.hover, 1.2);
    }
    for (const name of ["query", "key", "hovered"]) {
      for (const row of this.text.querySelectorAll(`.stepsal-${name}`)) row.classList.remove(`stepsal-${name}`);
    }
    if (cell) {
      this.rows[cell[0]].classList.add("stepsal-query");
      this.rows[cell[1]].classList.add("stepsal-key");
      if (!this.text.matches(":hover")) this.show(this.rows[cell[0]]);
    }
    if (step !== null) this.rows[step].classList.add("stepsal-hovered");
    this.readout.textContent = cell ? this.tell(cell) : "";
    const about = step ?? cell?.[0] ?? null;
    this.links.replaceChildren();
    if (about === null) return;
    const found = maps.links(this.map, this.values, about, Math.max(3, state.top_k));
    for (const [way, verb] of [["incoming", "draws on"], ["outgoing", "is drawn on by"]]) {
      const list = node(this.links, "div", way, `${this.info.labels[about]} ${verb} `);
      node(list, "b", "", found[way].map(([i, x]) => `${this.info.labels[i]} (${number(x)})`).join(", ") || "nothing");
    }
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

  block() {
    const [map, query, key] = this.explorer.state.zoom;
    return map === this.map && query < this.n ? [this.info.token_spans[query], this.info.token_spans[key]] : null;
  }

  drawTokens(positions) {
    const all = this.explorer.maps.data[`${this.map}/tokens`], spans = all && this.block();
    this.tokens.hidden = this.tokenReadout.hidden = !spans;
    this.tokenReadout.textContent = "";
    if (!spans) return;
    const [[q0, q1], [k0, k1]] = spans, size = packed(this.info.token_texts.length);
    const rows = q1 - q0, columns = k1 - k0;
    this.block_values = new Float32Array(rows * columns);
    for (let i = 0; i < rows; i++) {
      for (let j = 0; j < columns && k0 + j <= q0 + i; j++) {
        for (const p of positions) this.block_values[i * columns + j] += all[p * size + at(q0 + i, k0 + j)] / positions.length;
      }
    }
    const top = this.block_values.reduce((a, b) => Math.max(a, b), 0) || 1;
    const toShade = shade(top / 1000, top, this.explorer.state.scale, 0);
    const pixel = Math.max(2, Math.min(16, Math.floor(MAP / Math.max(rows, columns))));
    const context = sized(this.tokens, columns * pixel, rows * pixel);
    const colors = this.explorer.palettes[0];
    for (let i = 0; i < rows; i++) {
      for (let j = 0; j < columns; j++) {
        if (k0 + j > q0 + i) continue;
        const c = colors[toShade(this.block_values[i * columns + j])];
        context.fillStyle = `rgb(${c & 255},${(c >> 8) & 255},${(c >> 16) & 255})`;
        context.fillRect(j * pixel, i * pixel, pixel, pixel);
      }
    }
    this.tokens.dataset.shape = `${rows}x${columns}`;
    this.tokenReadout.textContent = `tokens of step ${this.info.labels[this.explorer.state.zoom[1]]} × those of ${this.info.labels[this.explorer.state.zoom[2]]}`;
  }

  hoverToken(event) {
    const spans = this.block();
    if (!spans) return;
    const [[q0, q1], [k0, k1]] = spans, box = this.tokens.getBoundingClientRect();
    const i = Math.floor(((event.clientY - box.top) / box.height) * (q1 - q0));
    const j = Math.floor(((event.clientX - box.left) / box.width) * (k1 - k0));
    if (i < 0 || j < 0 || i >= q1 - q0 || j >= k1 - k0) return;
    const [query, key] = [q0 + i, k0 + j].map((t) => JSON.stringify(this.info.token_texts[t]));
    this.tokenReadout.textContent = `${query} ← ${key}: ${number(this.block_values[i * (k1 - k0) + j])}`;
  }
}

// ------------------------------------------------------------------------------------------------ the whole

class Explorer {
  constructor(el, model) {
    Object.assign(this, { model, scene: model.get("scene"), waiting: new Set(), frame: 0, since: null });
    this.maps = new Maps(this.scene, model.get("buffers"));
    this.palettes = this.scene.palettes.map(palette);
    this.root = node(el, "div", "explorer");
    if (model.get("controls")) this.buildControls();
    this.panels = node(this.root, "div", "panels");
    this.depth = node(this.root, "div", "depth");
    this.profile = node(this.depth, "canvas", "profile");
    this.key = node(this.depth, "div", "profile-key");
    this.thumbs = node(this.depth, "canvas", "thumbs");
    for (const [canvas, label] of [[this.profile, "profile by layer"], [this.thumbs, "maps of all layers"]]) {
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `${label}; click chooses a layer`);
    }
    this.profile.addEventListener("click", (event) => this.chooseLayer((event.offsetX - 30) / ((this.profile.clientWidth - 40) / this.nLayers)));
    this.thumbs.addEventListener("click", (event) => {
      const each = THUMB + 4, row = Math.max(1, Math.floor(this.thumbs.clientWidth / each));
      this.chooseLayer(Math.floor(event.offsetY / (each + 10)) * row + Math.floor(event.offsetX / each));
    });
    this.root.addEventListener("keydown", (event) => {
      const step = { "[": -1, "]": 1 }[event.key];
      if (step) this.chooseLayer(this.state.layer + step);
    });
    this.drawing = () => this.draw();
    this.changed = () => {
      this.since ??= performance.now();
      this.schedule(this.drawing);
    };
    STATE.forEach((name) => model.on(`change:${name}`, this.changed));
    this.shown = "";
    this.draw();
  }

  get state() {
    return Object.fromEntries(STATE.map((name) => [name, this.model.get(name)]));
  }

  get nLayers() {
    return this.maps.maps[this.state.trace].layers.length;
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

  chooseLayer(position) {
    const layer = Math.floor(position);
    if (layer >= 0 && layer < this.nLayers) this.set({ layer, band: 0 });
  }

  shownTraces() {
    const { trace, compare, metric } = this.state;
    return compare >= 0 && compare !== trace && metric !== 3 ? [trace, compare] : [trace];
  }

  /** Run once before the next paint, however often it is asked for; then tell how long it took since the input. */
  schedule(work) {
    this.since ??= performance.now();
    this.waiting.add(work);
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      const todo = [...this.waiting];
      this.waiting.clear();
      this.frame = 0;
      for (const each of todo) each();
      const ms = performance.now() - this.since;
      this.since = null;
      this.root.dispatchEvent(new CustomEvent("stepsal-painted", { detail: { ms }, bubbles: true }));
    });
  }

  draw() {
    const traces = this.shownTraces();
    if (String(traces) !== this.shown) {
      this.shown = String(traces);
      this.panels.replaceChildren();
      this.each = traces.map((map) => new Panel(this, this.panels, map));
    }
    for (const panel of this.each) panel.draw();
    this.drawProfile();
    this.drawThumbs();
    if (this.controls) this.syncControls();
  }

  drawProfile() {
    const width = 420, height = 96, context = sized(this.profile, width, height);
    const style = getComputedStyle(this.root), ink = style.color;
    const lines = this.shownTraces().flatMap((map, k) =>
      ["lock_in", "summary_thinking"].map((name) => [map, k, name, this.maps.maps[map].profile[name]]));
    const values = lines.flatMap(([, , , ys]) => ys.filter((y) => y !== null));
    this.key.replaceChildren();
    if (!values.length) return;
    const low = Math.min(0, ...values), high = Math.max(...values, low + 1e-6), n = this.nLayers;
    const x = (p) => 30 + ((p + 0.5) / n) * (width - 40), y = (v) => height - 14 - ((v - low) / (high - low)) * (height - 24);
    const { layer, band, trace } = this.state, chosen = this.maps.positions(trace, layer, band);
    context.fillStyle = style.getPropertyValue("--stepsal-accent").trim() || "#009E73";
    context.globalAlpha = 0.25;
    for (const p of chosen) context.fillRect(x(p) - (width - 40) / n / 2, 4, (width - 40) / n, height - 16);
    context.globalAlpha = 1;
    context.fillStyle = ink;
    context.font = "9px sans-serif";
    context.fillText(high.toFixed(2), 2, y(high) + 4);
    context.fillText(low.toFixed(2), 2, y(low) + 2);
    context.fillText("layer", width / 2, height - 2);
    for (const [map, k, name, ys] of lines) {
      const color = this.scene.lines[name];
      context.strokeStyle = color;
      context.setLineDash(k ? [4, 3] : []);
      context.lineWidth = 1.6;
      context.beginPath();
      ys.forEach((v, p) => v !== null && context[p && ys[p - 1] !== null ? "lineTo" : "moveTo"](x(p), y(v)));
      context.stroke();
      const label = node(this.key, "span", "line", `${this.scene.line_names[name]}${lines.length > 2 ? `, ${this.maps.maps[map].label}${k ? " (dashed)" : ""}` : ""}`);
      label.style.setProperty("--stepsal-line", color);
    }
    this.profile.dataset.layer = chosen.join(" ");
  }

  drawThumbs() {
    const { trace, metric: wanted, compare, scale, layer, band, shared } = this.state;
    const metric = this.maps.has(trace, wanted, compare) ? wanted : 0;
    const { layers, roles } = this.maps.maps[trace], each = THUMB + 4;
    const row = Math.max(1, Math.floor(Math.max(each, this.root.clientWidth || 900) / each));
    const chosen = new Set(this.maps.positions(trace, layer, band));
    const draw = () => {
      const width = Math.min(layers.length, row) * each, height = Math.ceil(layers.length / row) * (each + 10);
      const context = sized(this.thumbs, width, height);
      context.font = "9px sans-serif";
      context.imageSmoothingEnabled = roles.length > THUMB;
      layers.forEach((name, p) => {
        const left = (p % row) * each, top = Math.floor(p / row) * (each + 10);
        const picture = this.maps.remember(["thumb", trace, metric, compare, scale, shared, p].join("/"), () => this.thumb(trace, metric, compare, scale, shared, p));
        context.drawImage(picture, left + 2, top + 2, THUMB, THUMB);
        context.strokeStyle = chosen.has(p) ? getComputedStyle(this.root).getPropertyValue("--stepsal-accent").trim() || "#009E73" : "rgba(128,128,128,.4)";
        context.lineWidth = chosen.has(p) ? 2.5 : 0.5;
        context.strokeRect(left + 2, top + 2, THUMB, THUMB);
        context.fillStyle = getComputedStyle(this.root).color;
        context.fillText(String(name), left + 3, top + each + 7);
      });
      this.thumbs.dataset.layers = layers.length;
    };
    const key = ["thumbs", trace, metric, compare, scale, shared].join("/");
    if (this.thumbed === key || layers.length * roles.length ** 2 < 3e5) draw();
    else { // many pixels: after the paint that the reader waits for
      clearTimeout(this.later);
      this.later = setTimeout(draw, 30);
    }
    this.thumbed = key;
  }

  thumb(trace, metric, compare, scale, shared, p) {
    const n = this.maps.maps[trace].roles.length;
    const [low, high] = this.maps.range([trace], metric, compare, [p], scale, shared);
    return picture(this.maps.values(trace, metric, compare, [p]), n, shade(low, high, scale, metric), this.palettes[metric === 3 ? 1 : 0]);
  }

  // Controls of the exported page; in JupyterLab ipywidgets take their place.
  buildControls() {
    const bar = node(this.root, "div", "controls"), { maps } = this.maps;
    const field = (label, input) => {
      const wrap = node(bar, "label", "control", `${label} `);
      wrap.append(input);
      return input;
    };
    const select = (name, options, from = 0) => {
      const input = document.createElement("select");
      options.forEach((text, i) => { node(input, "option", "", text).value = i + from; });
      input.addEventListener("change", () => this.set({ [name]: Number(input.value) }));
      return input;
    };
    const range = (name, max, more = {}) => {
      const input = Object.assign(document.createElement("input"), { type: "range", min: 0, max, step: 1 });
      input.addEventListener("input", () => this.set({ [name]: Number(input.value), ...more }));
      return input;
    };
    const layer = field("layer", range("layer", this.nLayers - 1, { band: 0 }));
    this.controls = { layer };
    const play = node(bar, "button", "play", "▶");
    play.type = "button";
    play.title = "play through the layers";
    play.addEventListener("click", () => {
      if (this.timer) { clearInterval(this.timer); this.timer = 0; }
      else this.timer = setInterval(() => this.set({ layer: (this.state.layer + 1) % this.nLayers, band: 0 }), 400);
      play.textContent = this.timer ? "■" : "▶";
    });
    this.controls.band = field("band", select("band", ["one layer", ...BANDS.slice(1)]));
    if (maps.length > 1) {
      this.controls.trace = field("trace", select("trace", maps.map((m) => m.label)));
      this.controls.compare = field("beside", select("compare", ["nothing", ...maps.map((m) => m.label)], -1));
    }
    this.controls.metric = field("metric", select("metric", this.scene.names));
    this.controls.scale = field("scale", select("scale", ["log", "linear"]));
    const shared = Object.assign(document.createElement("input"), { type: "checkbox" });
    shared.addEventListener("change", () => this.set({ shared: shared.checked }));
    this.controls.shared = field("one scale for all layers", shared);
    this.controls.top_k = field("links", range("top_k", 5));
    this.controls.view = field("view", select("view", ["map", "arcs"]));
    for (const [name, input] of Object.entries(this.controls)) input.classList.add(`stepsal-control-${name.replace("_", "-")}`);
  }

  syncControls() {
    for (const [name, input] of Object.entries(this.controls)) {
      if (input.type === "checkbox") input.checked = this.state[name];
      else input.value = String(this.state[name]);
    }
  }

  close() {
    STATE.forEach((name) => this.model.off(`change:${name}`, this.changed));
    clearInterval(this.timer);
    clearTimeout(this.later);
    cancelAnimationFrame(this.frame);
  }
}

function render({ model, el }) {
  const explorer = new Explorer(el, model);
  return () => explorer.close();
}

export default { render };
