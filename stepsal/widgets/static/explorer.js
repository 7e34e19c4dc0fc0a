// The whole explorer: panels of the traces that are shown, all layers below, and what the reader chooses.

class Explorer {
  constructor(el, model) {
    Object.assign(this, { model, scene: model.get("scene"), waiting: new Set(), frame: 0, shown: "" });
    this.maps = new Maps(this.scene, model.get("buffers"));
    this.palettes = this.scene.palettes.map(palette);
    this.root = node(el, "div", "explorer");
    this.root.dataset.lmSuppressShortcuts = "true"; // JupyterLab's own meaning of arrows and Enter
    this.build();
    this.listen();
    this.draw();
  }

  build() {
    const onPage = this.model.get("controls");
    if (onPage) buildFacts(this.root, this.scene);
    this.controls = onPage ? new Controls(this, this.root) : null;
    this.panels = node(this.root, "div", "panels");
    const depth = node(this.root, "div", "depth");
    this.profile = new Profile(this, depth);
    this.thumbs = new Thumbs(this, depth);
    node(this.root, "div", "help", this.help());
    buildHowToRead(this.root, this.scene, onPage);
  }

  help() {
    const tokens = this.maps.maps.some((_, map) => this.maps.data[`${map}/tokens`]);
    const zoom = tokens ? "z or double click opens a cell into its tokens, " : "";
    return `On the map: arrows move, Enter or click pins, ${zoom}+ and − zoom, Esc clears. [ and ] change the layer.`;
  }

  listen() {
    const { model } = this;
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.drawing = () => this.draw();
    this.changed = () => this.schedule(this.drawing);
    STATE.forEach((name) => model.on(`change:${name}`, this.changed));
    // The slider follows the layer; when it is moved by hand, the reader wants to see that layer and not the band.
    this.followed = () => this.set({ slider: this.state.layer });
    this.slid = () => model.get("slider") !== model.get("layer") && this.set({ layer: model.get("slider"), band: 0 });
    model.on("change:layer", this.followed);
    model.on("change:slider", this.slid);
    // at first, when the page around has its place and its colours; then when there is room for more or less
    this.resized = new ResizeObserver(() => this.thumbs.fitting() !== this.thumbs.perRow && this.changed());
    this.resized.observe(this.root);
    this.darkness = matchMedia("(prefers-color-scheme: dark)"); // canvases don't follow a theme by themselves
    this.darkness.addEventListener("change", this.changed);
    this.themed = new MutationObserver(this.changed);
    this.themed.observe(document.body, { attributeFilter: ["class", "data-jp-theme-name", "data-vscode-theme-kind"] });
  }

  key(event) {
    const { state } = this, step = { "[": -1, "]": 1 }[event.key];
    const { layers } = this.maps.maps[state.trace], next = Math.min(state.layer, layers.length - 1) + step;
    if (step && next >= 0 && next < layers.length) this.set({ layer: next, band: 0 });
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

  /** Open a cell into its tokens; false where there are none. */
  zoom(map, cell) {
    const { token_spans } = this.maps.maps[map], kept = cell.every((step) => token_spans[step]?.[1] > 0);
    if (!this.maps.data[`${map}/tokens`] || !kept) return false;
    this.set({ zoom: [map, ...cell], pinned: [map, ...cell] });
    return true;
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
    const ink = (style.color.match(/[\d.]+/g) ?? []).slice(0, 3); // none before the page around has its place
    const light = ink.reduce((sum, x) => sum + Number(x), 0) > 384; // on dark paper
    this.style = {
      ink: style.color, accent: style.getPropertyValue("--stepsal-accent").trim() || "#c2187f",
      empty: light ? "rgba(150,150,150,.4)" : "rgba(128,128,128,.1)",
    };
    if (String(traces) !== this.shown) {
      this.shown = String(traces);
      this.panels.replaceChildren();
      this.each = traces.map((map) => new Panel(this, this.panels, map));
      this.prepare(traces);
    }
    for (const panel of this.each) panel.draw();
    this.profile.draw();
    this.thumbs.draw();
    this.controls?.sync();
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

  close() {
    STATE.forEach((name) => this.model.off(`change:${name}`, this.changed));
    this.model.off("change:layer", this.followed);
    this.model.off("change:slider", this.slid);
    this.controls?.close();
    this.thumbs.close();
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
