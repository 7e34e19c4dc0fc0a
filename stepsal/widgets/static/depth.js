// All layers at once: a profile of two metrics, and a thumbnail of each layer; both choose layers.

const PATIENCE = 6; // milliseconds for thumbnails that are not there yet
const PROFILE = { width: 440, height: 100, left: 32, right: 8, top: 12, bottom: 16 };

class Profile {
  constructor(explorer, parent) {
    this.explorer = explorer;
    this.canvas = node(parent, "canvas", "profile");
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", "profile by layer; click chooses a layer");
    this.key = node(parent, "div", "profile-key");
    this.canvas.addEventListener("click", (event) => explorer.chooseLayer(this.layerAt(event.offsetX)));
  }

  /** Middle of a layer in the profile, by its number in the model; and the reverse. */
  x(layer) { return PROFILE.left + (layer + 0.5) * this.each; }

  layerAt(x) { return Math.floor((x - PROFILE.left) / this.each); }

  draw() {
    const { state, maps, scene } = this.explorer, traces = maps.traces(state), names = Object.keys(scene.lines);
    const { layers } = maps.maps[state.trace], chosen = maps.chosen(state.trace, state).map((p) => layers[p]);
    this.each = (PROFILE.width - PROFILE.left - PROFILE.right) / (1 + Math.max(...traces.flatMap((map) => maps.maps[map].layers)));
    const lines = traces.flatMap((map, k) => names.map((name) => ({ info: maps.maps[map], name, dashed: k > 0, several: traces.length > 1 })));
    const values = lines.flatMap(({ info, name }) => info.profile[name].filter((v) => v !== null));
    const context = sized(this.canvas, PROFILE.width, PROFILE.height);
    this.canvas.dataset.layers = chosen.join(" ");
    this.key.replaceChildren();
    for (const line of lines) this.name(line);
    if (!values.length) return;
    const low = Math.min(0, ...values), high = Math.max(...values, low + 1e-6);
    const y = (v) => PROFILE.height - PROFILE.bottom - ((v - low) / (high - low)) * (PROFILE.height - PROFILE.top - PROFILE.bottom);
    this.paintAxes(context, chosen, layers, [low, high].map((v) => [v, y(v)]));
    for (const line of lines) this.paintLine(context, line, y);
  }

  paintAxes(context, chosen, layers, ends) {
    const { style } = this.explorer, foot = PROFILE.height - PROFILE.bottom;
    context.fillStyle = style.accent;
    context.globalAlpha = 0.25;
    for (const layer of chosen) context.fillRect(this.x(layer) - this.each / 2, 4, this.each, foot - 2);
    context.globalAlpha = 1;
    context.fillStyle = style.ink;
    context.font = "9px system-ui, sans-serif";
    context.textAlign = "right";
    for (const [value, y] of ends) context.fillText(Math.abs(value) < 0.005 ? "0" : value.toFixed(2), PROFILE.left - 4, y + 3);
    context.fillText("layer", PROFILE.left - 4, PROFILE.height - 3);
    context.textAlign = "center";
    let end = -Infinity; // labels that would touch are left out, the chosen ones never
    const named = [...new Set([...chosen, layers[0], layers.at(-1)])], near = (a, b) => Math.abs(this.x(a) - this.x(b)) < 14;
    for (const layer of named.filter((l, i) => !named.slice(0, i).some((other) => near(l, other))).sort((a, b) => a - b)) {
      if (this.x(layer) > end) context.fillText(String(layer), this.x(layer), PROFILE.height - 3);
      end = this.x(layer) + 6;
    }
  }

  paintLine(context, { info, name, dashed }, y) {
    const ys = info.profile[name];
    context.strokeStyle = this.explorer.scene.lines[name];
    context.setLineDash(dashed ? [4, 3] : []);
    context.lineWidth = 1.6;
    context.beginPath();
    ys.forEach((v, p) => v !== null && context[p && ys[p - 1] !== null ? "lineTo" : "moveTo"](this.x(info.layers[p]), y(v)));
    context.stroke();
  }

  /** The name of a line; of one that is not there, the reason. */
  name({ info, name, dashed, several }) {
    const { scene } = this.explorer, reason = info.undefined[name];
    const text = `${scene.line_names[name]}${several ? `, ${info.label}` : ""}${reason ? `: not defined (${reason})` : ""}`;
    const label = node(this.key, "span", "line", text);
    label.style.setProperty("--stepsal-line", scene.lines[name]);
    label.classList.toggle("stepsal-dashed", dashed);
    label.classList.toggle("stepsal-undefined", Boolean(reason));
  }
}

class Thumbs {
  constructor(explorer, parent) {
    this.explorer = explorer;
    this.root = node(parent, "div", "all-layers");
    this.perRow = 0;
  }

  fitting() {
    return Math.max(1, Math.floor((this.explorer.root.clientWidth || 900) / (THUMB + 4)));
  }

  /** Those that take long are left for after the paint that the reader waits for. */
  draw() {
    const traces = this.explorer.maps.traces(this.explorer.state), until = performance.now() + PATIENCE;
    this.perRow = this.fitting();
    if (this.root.dataset.traces !== String(traces)) this.build(traces);
    const canvases = this.root.querySelectorAll("canvas");
    const missing = traces.map((map, k) => this.paint(map, canvases[k], until));
    clearTimeout(this.later);
    if (missing.some(Boolean)) this.later = setTimeout(() => this.draw());
  }

  build(traces) {
    this.root.dataset.traces = String(traces);
    this.root.replaceChildren();
    for (const map of traces) {
      const info = this.explorer.maps.maps[map];
      if (traces.length > 1) node(this.root, "div", "thumbs-of", info.label);
      const canvas = node(this.root, "canvas", "thumbs"), each = THUMB + 4;
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", "maps of all layers; click chooses a layer");
      canvas.addEventListener("click", (event) => {
        const column = Math.min(this.perRow - 1, Math.floor(event.offsetX / each));
        const layer = info.layers[Math.floor(event.offsetY / (each + 10)) * this.perRow + column];
        if (layer !== undefined) this.explorer.chooseLayer(layer);
      });
    }
  }

  paint(map, canvas, until) {
    const { state, maps, style: { accent, ink, empty } } = this.explorer, { layers } = maps.maps[map];
    const each = THUMB + 4, row = this.perRow, chosen = new Set(maps.chosen(map, state));
    const context = sized(canvas, Math.min(layers.length, row) * each, Math.ceil(layers.length / row) * (each + 10));
    context.font = "9px system-ui, sans-serif";
    let missing = 0;
    layers.forEach((name, p) => {
      const left = (p % row) * each + 2, top = Math.floor(p / row) * (each + 10) + 2, small = this.small(map, p, until);
      context.fillStyle = empty;
      context.fillRect(left, top, THUMB, THUMB);
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

  /** The picture of a layer; null where there is no time for it now. */
  small(map, p, until) {
    const { state, maps, palettes } = this.explorer, metric = maps.metric(map, state), { roles } = maps.maps[map];
    const alone = { ...state, band: 0, trace: map, layer: p }; // how this layer would look if it were chosen
    const range = state.shared ? maps.range(map, state) : maps.range(map, alone);
    const key = ["thumb", map, p, metric, state.compare, state.scale, range].join("/");
    if (performance.now() >= until && !maps.kept.has(key)) return null;
    return maps.remember(key, () => {
      const [values, n] = shrunk(maps.values(map, alone, [p]), roles.length, 2 * THUMB);
      return picture(values, n, shade(...range, state.scale, metric), palettes[metric === DIFFERENCE ? 1 : 0]);
    });
  }

  close() { clearTimeout(this.later); }
}
