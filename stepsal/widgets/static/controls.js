// Controls of the exported page; in JupyterLab ipywidgets take their place.

class Controls {
  constructor(explorer, parent) {
    Object.assign(this, { explorer, inputs: {} });
    this.bar = node(parent, "div", "controls");
    const { maps } = explorer.maps, labels = maps.map((m) => m.label);
    this.range("slider", "layer", Math.max(...maps.map((m) => m.layers.length)) - 1);
    this.play();
    this.select("band", "band", ["one layer", ...BANDS.slice(1)].map((text, i) => [text, i]));
    if (maps.length > 1) {
      this.select("trace", "trace", labels.map((text, i) => [text, i]));
      this.select("compare", "beside", ["nothing", ...labels].map((text, i) => [text, i]));
    }
    this.select("metric", "metric", explorer.scene.offered.map((i) => [explorer.scene.names[i], i]));
    this.select("scale", "scale", [["log", 0], ["linear", 1]]);
    this.box("shared", "one scale for all layers");
    this.select("view", "view", [["map", 0], ["arcs", 1]]);
    this.range("top_k", "links", 5, "the strongest links of each step: framed in the map, drawn as arcs");
    this.range("threshold", "arcs from", 50, "arcs of a smaller part of their row than this are left out", " %");
    // who chooses arcs wants to see some
    this.inputs.view.addEventListener("change", () => explorer.state.view === 1 && explorer.state.top_k === 0 && explorer.set({ top_k: 2 }));
  }

  field(name, label, input) {
    const around = node(this.bar, "label", "control", `${label} `);
    around.append(input);
    input.classList.add(`stepsal-control-${name.replace("_", "-")}`);
    this.inputs[name] = input;
    return around;
  }

  select(name, label, options) {
    const input = document.createElement("select");
    for (const [text, value] of options) node(input, "option", "", text).value = value;
    input.addEventListener("change", () => this.explorer.set({ [name]: Number(input.value) }));
    this.field(name, label, input);
  }

  range(name, label, max, title = "", unit = "") {
    const input = Object.assign(document.createElement("input"), { type: "range", min: 0, max, step: 1 });
    input.addEventListener("input", () => this.explorer.set({ [name]: Number(input.value) }));
    const around = this.field(name, label, input);
    around.title = title;
    input.told = node(around, "span", "value");
    input.unit = unit;
  }

  box(name, label) {
    const input = Object.assign(document.createElement("input"), { type: "checkbox" });
    input.addEventListener("change", () => this.explorer.set({ [name]: input.checked }));
    this.field(name, label, input);
  }

  play() {
    const { explorer } = this, button = node(this.bar, "button", "play", "▶");
    Object.assign(button, { type: "button", title: "play through the layers" });
    button.addEventListener("click", () => {
      if (this.timer) this.timer = clearInterval(this.timer);
      else this.timer = setInterval(() => this.next(), 400);
      button.textContent = this.timer ? "■" : "▶";
    });
  }

  next() {
    const { state, maps } = this.explorer;
    this.explorer.set({ slider: (state.layer + 1) % maps.maps[state.trace].layers.length });
  }

  sync() {
    const { model } = this.explorer;
    for (const [name, input] of Object.entries(this.inputs)) {
      if (input.type === "checkbox") input.checked = model.get(name);
      else input.value = String(model.get(name));
      if (input.told) input.told.textContent = name === "slider" ? String(this.explorer.maps.layer(this.explorer.state)) : `${input.value}${input.unit}`;
    }
    this.inputs.threshold.parentElement.hidden = model.get("view") !== 1;
  }

  close() { clearInterval(this.timer); }
}
