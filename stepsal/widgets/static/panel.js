// One trace: its map, the tokens and heads behind a cell, and its text.

class Panel {
  constructor(explorer, parent, map) {
    Object.assign(this, { explorer, map, info: explorer.maps.maps[map], hover: null, step: null });
    this.n = this.info.roles.length;
    this.marking = () => this.mark();
    this.drawing = () => this.draw();
    this.root = node(parent, "section", "panel");
    this.root.dataset.label = this.info.label;
    this.title = node(this.root, "div", "title");
    const columns = node(this.root, "div", "columns"), left = node(columns, "div", "left"), right = node(columns, "div", "right");
    this.chart = new Chart(this, left);
    this.readout = node(left, "div", "readout");
    this.tokens = new Tokens(this, left);
    this.reading = new Reading(this, right);
    this.heads = new Heads(this, right);
  }

  leave() {
    this.hoverCell(null);
    this.hoverStep(null);
  }

  clear() {
    this.leave();
    this.explorer.set({ pinned: [], zoom: [] });
    this.explorer.schedule(this.drawing);
  }

  pin(cell) { this.explorer.pin(this.map, cell); }

  openTokens(cell) {
    if (cell && !this.explorer.zoom(this.map, cell)) this.tokens.refuse();
  }

  /** Whether a screen reader is to say what changes. */
  speak(politeness) { this.readout.ariaLive = this.reading.links.ariaLive = politeness; }

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

  strongest(query, most) {
    return this.explorer.maps.links(this.map, this.values, query, most).incoming;
  }

  draw() {
    const { state, maps } = this.explorer, positions = maps.chosen(this.map, state);
    this.metric = maps.metric(this.map, state);
    this.values = maps.shown(this.map, state);
    this.chart.draw(this.metric, maps.range(this.map, state));
    this.title.textContent = this.titled(positions);
    this.chart.canvas.setAttribute("aria-label", `step map of ${this.title.textContent}; arrows move, Enter pins, z zooms into tokens`);
    this.tokens.draw(positions);
    this.heads.draw(positions);
    this.reading.rank();
    this.mark();
  }

  titled(positions) {
    const { state, maps, scene } = this.explorer, { metric } = this;
    const layers = positions.map((p) => this.info.layers[p]);
    const where = state.band > 0 ? `${BANDS[state.band]} layers ${layers[0]}–${layers.at(-1)}` : `layer ${layers[0]}`;
    const against = metric === DIFFERENCE ? ` − ${maps.maps[state.compare - 1].label}` : "";
    const note = metric === state.metric ? "" : ` (${scene.notes[state.metric === ATTENTION ? "attention" : "difference"]})`;
    return `${this.info.label}${against} · ${where} · ${scene.names[metric]}${note}`;
  }

  /** Hover, pin and top-k marks, and all that tells about them. */
  mark() {
    const { state, maps } = this.explorer, { step } = this, cell = this.hover ?? this.pinned(), about = step ?? cell?.[0] ?? null;
    const links = about === null ? null : { about, ...maps.links(this.map, this.values, about, Math.max(3, state.top_k)) };
    this.readout.textContent = cell ? this.tell(cell) : "";
    this.chart.mark(cell, step, links);
    this.heads.mark(cell);
    this.chart.tell(state.view === 0 ? this.hover : null, this.readout.textContent);
    this.reading.mark(cell, step, links);
    this.chart.placeTip(); // after all that changes what stands where
  }

  tell([query, key]) {
    const value = this.values[at(query, key)];
    let rank = 1;
    for (let j = 0; j <= query; j++) if (Math.abs(this.values[at(query, j)]) > Math.abs(value)) rank++;
    const { labels, roles } = this.info;
    return `step ${labels[query]} (${roles[query]}) ← ${labels[key]} (${roles[key]}): ${number(value)}, rank ${rank} of ${query + 1}`;
  }
}
