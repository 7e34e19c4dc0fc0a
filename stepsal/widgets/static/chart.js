// The map of one trace, or its arcs, with the marks on it: where the reader points, what is pinned, strongest links.

const ZOOMED_CELL = 16; // CSS pixels of a cell that needs no zoom
const MINIMAP = 56, BAR = 110;

class Chart {
  constructor(panel, parent) {
    Object.assign(this, { panel, n: panel.n, factor: 1 });
    this.most = 2 ** Math.max(0, Math.ceil(Math.log2((ZOOMED_CELL * this.n) / MAP)));
    this.frame = node(parent, "div", "frame");
    this.whole = node(this.frame, "div", "whole");
    const seen = node(this.whole, "div", "seen");
    Object.assign(seen.style, { width: `${LEFT + MAP}px`, height: `${MAP + BOTTOM}px` });
    this.canvas = node(seen, "canvas", "map");
    this.overlay = node(seen, "canvas", "overlay");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application"); // it has keys of its own
    this.tip = node(parent, "div", "tip");
    this.tip.hidden = true;
    this.buildFoot(node(parent, "div", "foot"));
    this.listen();
    this.resize();
  }

  buildFoot(foot) {
    this.colorbar = node(foot, "div", "colorbar");
    this.low = node(this.colorbar, "span", "low");
    this.bar = node(this.colorbar, "canvas", "bar");
    this.high = node(this.colorbar, "span", "high");
    this.quantity = node(this.colorbar, "span", "quantity");
    this.axes = node(foot, "div", "axes");
    const tools = node(foot, "div", "zoom-tools");
    tools.hidden = this.most === 1;
    for (const [text, title, change] of [
      ["+", "zoom in (+)", () => 2 * this.factor], ["−", "zoom out (−)", () => this.factor / 2], ["fit", "fit all steps (0)", () => 1],
    ]) {
      const button = node(tools, "button", "zoom-button", text);
      Object.assign(button, { type: "button", title });
      button.addEventListener("click", () => this.zoom(change()));
    }
    this.minimap = node(foot, "canvas", "minimap");
    this.minimap.title = "the part of the map that is seen; click to go elsewhere";
    this.minimap.addEventListener("click", (event) => {
      const [i, j] = [event.offsetY, event.offsetX].map((x) => (x / MINIMAP) * this.n);
      this.centre(i, j);
    });
  }

  listen() {
    const { canvas, frame, panel } = this;
    canvas.addEventListener("pointermove", (event) => this.pointAt(event));
    canvas.addEventListener("pointerleave", () => panel.leave());
    canvas.addEventListener("blur", () => panel.leave());
    canvas.addEventListener("click", (event) => event.detail < 2 && panel.pin(this.cellAt(event)));
    canvas.addEventListener("dblclick", (event) => panel.openTokens(this.cellAt(event)));
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return; // plain wheels scroll
      event.preventDefault();
      this.zoom(event.deltaY < 0 ? 2 * this.factor : this.factor / 2, this.stepsAt(event));
    });
    this.scrolling = () => { this.paint(); panel.mark(); };
    frame.addEventListener("scroll", () => panel.explorer.schedule(this.scrolling));
  }

  // ---------------------------------------------------------------------------------------------- places

  resize() {
    this.cell = (MAP / this.n) * this.factor;
    Object.assign(this.whole.style, { width: `${LEFT + this.n * this.cell}px`, height: `${this.n * this.cell + BOTTOM}px` });
    this.frame.dataset.cell = this.cell;
  }

  /** Show cells that many times as large as where all fit, around the middle of what is seen, or around a cell. */
  zoom(factor, around) {
    const { scrollTop, scrollLeft } = this.frame, cell = this.panel.hover ?? this.panel.pinned();
    const middle = around ?? cell ?? [scrollTop, scrollLeft].map((x) => (x + MAP / 2) / this.cell);
    this.factor = Math.max(1, Math.min(this.most, factor));
    this.resize();
    this.centre(...middle);
    this.panel.explorer.schedule(this.panel.drawing);
  }

  centre(row, column) {
    this.frame.scrollTop = (row + 0.5) * this.cell - MAP / 2;
    this.frame.scrollLeft = (column + 0.5) * this.cell - MAP / 2;
  }

  /** Scroll until a cell is seen. */
  reveal(query, key) {
    const beyond = (edge) => (edge < 0 ? edge : Math.max(0, edge + this.cell - MAP));
    this.frame.scrollTop += beyond(this.y(query));
    this.frame.scrollLeft += beyond(this.x(key) - LEFT);
  }

  /** Left edge of a step's column, upper edge of its row: in the canvas. */
  x(step) { return LEFT + step * this.cell - this.frame.scrollLeft; }

  y(step) { return step * this.cell - this.frame.scrollTop; }

  /** Height of the last row where it is below what is seen, and kept in sight at the lower edge; else 0. */
  get kept() { return this.y(this.n) > MAP + 0.5 ? Math.max(10, this.cell) : 0; }

  /** Upper edge and height of a row. */
  row(step) { return step === this.n - 1 && this.kept ? [MAP - this.kept, this.kept] : [this.y(step), this.cell]; }

  stepsAt(event) {
    const box = this.canvas.getBoundingClientRect(), y = event.clientY - box.top;
    const last = this.kept && y >= MAP - this.kept && y < MAP;
    const query = last ? this.n - 1 : Math.floor((y + this.frame.scrollTop) / this.cell);
    return [query, Math.floor((event.clientX - box.left - LEFT + this.frame.scrollLeft) / this.cell)];
  }

  cellAt(event) {
    const [query, key] = this.stepsAt(event);
    return this.panel.explorer.state.view === 0 && key >= 0 && key <= query && query < this.n ? [query, key] : null;
  }

  // ---------------------------------------------------------------------------------------------- the reader

  pointAt(event) {
    this.panel.speak("off"); // a screen reader follows the keyboard, not the mouse
    if (this.panel.explorer.state.view === 0) return this.panel.hoverCell(this.cellAt(event));
    const step = this.stepsAt(event)[1];
    this.panel.hoverStep(step >= 0 && step < this.n ? step : null);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { panel } = this;
    panel.speak("polite");
    const [query, key] = panel.hover ?? panel.pinned() ?? [this.n - 1, 0];
    const moves = { ArrowUp: [query - 1, key], ArrowDown: [query + 1, key], ArrowLeft: [query, key - 1], ArrowRight: [query, key + 1] };
    const actions = {
      Enter: () => panel.pin([query, key]), " ": () => panel.pin([query, key]), z: () => panel.openTokens([query, key]),
      "+": () => this.zoom(2 * this.factor), "-": () => this.zoom(this.factor / 2), 0: () => this.zoom(1),
    };
    if (event.key === "Escape") panel.clear();
    else if (panel.explorer.state.view !== 0) return;
    else if (moves[event.key]) this.move(...moves[event.key]);
    else if (actions[event.key]) actions[event.key]();
    else return;
    event.preventDefault();
  }

  move(query, key) {
    const row = Math.max(0, Math.min(this.n - 1, query)), column = Math.max(0, Math.min(row, key));
    this.panel.hoverCell([row, column]);
    this.reveal(row, column);
  }

  // ---------------------------------------------------------------------------------------------- painting

  draw(metric, [low, high]) {
    const { scene, palettes, state } = this.panel.explorer, { values } = this.panel;
    const colors = palettes[metric === DIFFERENCE ? 1 : 0];
    const [shown, rows] = this.cell < 1 ? shrunk(values, this.n, MAP) : [values, this.n];
    this.picture = picture(shown, rows, shade(low, high, state.scale, metric), colors);
    if (metric === SHARE && rows === this.n) this.picture.getContext("2d").clearRect(0, 0, 1, 1); // 1 by definition
    this.paint();
    const bar = sized(this.bar, BAR, 8);
    for (let x = 0; x < BAR; x++) {
      bar.fillStyle = css(colors[Math.round((x / (BAR - 1)) * 255)]);
      bar.fillRect(x, 0, 1, 8);
    }
    this.low.textContent = number(low);
    this.high.textContent = number(high);
    this.quantity.textContent = `${scene.names[metric]}${state.scale === 0 && metric !== DIFFERENCE ? ", log" : ""}`;
    this.explain(state);
  }

  /** Say below the picture what its places and lines mean. */
  explain({ view, top_k }) {
    const arcs = view === 1, few = top_k === 1 ? "the other step" : `the ${top_k} other steps`;
    this.colorbar.hidden = arcs;
    this.axes.classList.toggle("stepsal-of-arcs", arcs);
    const frames = top_k === 0 ? "" : ` · frames: ${few} that a row draws on most`;
    this.axes.textContent = arcs
      ? `arcs: from each step to ${few} that it draws on most, in the colour of the step drawn on (pink: those of the marked step); the wider the larger the share of its row, full width from 50 % on`
      : `rows: step being written (query) · columns: step it draws on (key)${frames}`;
  }

  /** The part of the map that is seen, with the roles and numbers of its steps. */
  paint() {
    const context = sized(this.canvas, LEFT + MAP, MAP + BOTTOM);
    this.paintMinimap();
    if (this.panel.explorer.state.view === 1) return this.drawArcs(context);
    this.paintCells(context);
    this.paintAxes(context);
  }

  paintCells(context) {
    const { cell, n, frame, kept, picture: { width } } = this, each = width / n; // pixels of the picture for a step
    const side = Math.min(n, MAP / cell) * each, [left, top] = [frame.scrollLeft, frame.scrollTop].map((x) => (x / cell) * each);
    context.fillStyle = this.panel.explorer.style.empty; // the future, and the corner of shares
    context.fillRect(LEFT, 0, MAP, MAP);
    context.drawImage(this.picture, left, top, side, side, LEFT, 0, MAP, MAP);
    if (!kept) return;
    context.clearRect(LEFT, MAP - kept - 3, MAP, kept + 3); // a gap says that rows are left out
    context.drawImage(this.picture, left, width - each, side, each, LEFT, MAP - kept, MAP, kept);
  }

  paintAxes(context) {
    const { cell, kept } = this, { info, explorer: { scene, style } } = this.panel;
    context.clearRect(0, 0, LEFT, MAP + BOTTOM);
    context.font = "9px system-ui, sans-serif";
    const every = [1, 2, 5, 10, 20, 50, 100].find((k) => k * cell >= 14) ?? 200;
    info.roles.forEach((role, i) => {
      const x = this.x(i), [y, height] = this.row(i), named = role === "thinking" ? i % every === 0 : role !== info.roles[i - 1];
      const seen = y > -cell && y < (i === this.n - 1 ? MAP : MAP - kept);
      context.fillStyle = scene.colors[role];
      if (seen) context.fillRect(LEFT - STRIP - 2, y, STRIP, Math.ceil(height));
      if (x > LEFT - cell && x < LEFT + MAP) context.fillRect(x, MAP + 2, Math.ceil(cell), STRIP);
      context.fillStyle = style.ink;
      context.textAlign = "right";
      const last = kept && i === this.n - 1;
      if ((named || last) && seen && y >= 0) context.fillText(info.labels[i], LEFT - STRIP - 5, Math.max(8, y + Math.min(height, 14) / 2 + 4));
      context.textAlign = "center";
      if (named && x >= LEFT && x < LEFT + MAP) context.fillText(info.labels[i], this.labelX(i), MAP + BOTTOM - 4);
    });
  }

  /** Middle of a label below a step; the last is moved to where all of it is seen, others that are cut lie outside. */
  labelX(step) {
    const x = this.x(step) + this.cell / 2, right = LEFT + MAP - 3 * this.panel.info.labels[step].length;
    return x <= right ? x : step === this.n - 1 ? right : 2 * (LEFT + MAP);
  }

  paintMinimap() {
    this.minimap.hidden = this.factor === 1;
    if (this.factor === 1) return;
    const context = sized(this.minimap, MINIMAP, MINIMAP), scale = MINIMAP / (this.n * this.cell);
    context.imageSmoothingEnabled = true;
    context.drawImage(this.picture, 0, 0, MINIMAP, MINIMAP);
    context.strokeStyle = this.panel.explorer.style.accent;
    context.lineWidth = 2;
    context.strokeRect(this.frame.scrollLeft * scale, this.frame.scrollTop * scale, MAP * scale, MAP * scale);
  }

  // ---------------------------------------------------------------------------------------------- arcs

  drawArcs(context) {
    const base = MAP - 30, { info, explorer: { scene, state, style } } = this.panel, apart = this.panel.pinned();
    this.sums = Array.from({ length: this.n }, (_, i) => {
      let sum = 0;
      for (let j = 0; j <= i; j++) sum += Math.abs(this.panel.values[at(i, j)]);
      return sum || 1;
    });
    let drawn = 0;
    for (let i = 0; i < this.n; i++) {
      for (const [j, value] of this.panel.strongest(i, state.top_k)) {
        if (Math.abs(value) / this.sums[i] < state.threshold / 100) continue;
        this.arc(context, i, j, value, scene.colors[info.roles[j]], apart && apart[0] !== i ? 0.25 : 1);
        drawn++;
      }
    }
    this.frame.dataset.arcs = drawn;
    this.paintSteps(context, base);
    context.fillStyle = style.ink;
    context.font = "11px system-ui, sans-serif";
    const none = state.top_k ? `no link of ${state.threshold} % of its row or more: lower the threshold` : "links is 0: no arcs but those of the step that you point at";
    if (!drawn) context.fillText(none, LEFT + 8, 20);
  }

  paintSteps(context, base) {
    const { info, explorer: { scene, style } } = this.panel;
    const every = [1, 2, 5, 10, 20, 50, 100].find((k) => k * this.cell >= 18) ?? 200;
    context.globalAlpha = 1;
    context.font = "9px system-ui, sans-serif";
    context.textAlign = "center";
    info.roles.forEach((role, i) => {
      context.fillStyle = scene.colors[role];
      context.beginPath();
      context.arc(this.x(i) + this.cell / 2, base, Math.min(4, Math.max(1.2, this.cell * 0.3)), 0, 7);
      context.fill();
      context.fillStyle = style.ink;
      const named = role === "thinking" ? i % every === 0 : role !== info.roles[i - 1];
      if (named) context.fillText(info.labels[i], this.labelX(i), base + 18);
    });
    context.textAlign = "left";
  }

  /** From the key step to the query step that uses it, as in `stepsal.plots.flow_arcs`: half of a row is full strength. */
  arc(context, query, key, value, color, alpha = 1) {
    const base = MAP - 30, strength = Math.sqrt(Math.min(1, Math.abs(value) / this.sums[query] / 0.5));
    const height = ((query - key) / Math.max(1, this.n - 1)) ** 0.7 * (4 / 3) * (base - 10);
    const [from, to] = [key, query].map((step) => this.x(step) + this.cell / 2);
    context.strokeStyle = color;
    context.globalAlpha = alpha * (0.12 + 0.78 * strength);
    context.lineWidth = 0.4 + Math.min(2.4, Math.max(0.6, this.cell / 4)) * strength;
    context.beginPath();
    context.moveTo(from, base);
    context.bezierCurveTo(from, base - height, to, base - height, to, base);
    context.stroke();
  }

  // ---------------------------------------------------------------------------------------------- marks

  mark(cell, step, links) {
    const context = sized(this.overlay, LEFT + MAP, MAP + BOTTOM), { state, style } = this.panel.explorer;
    context.beginPath();
    context.rect(LEFT, 0, MAP, MAP);
    context.clip();
    if (state.view === 0) this.markCells(context, cell, step);
    else if (links) {
      for (const [i, x] of links.incoming) this.arc(context, links.about, i, x, style.accent);
      for (const [i, x] of links.outgoing) this.arc(context, i, links.about, x, style.accent);
    }
  }

  markCells(context, cell, step) {
    const { state, style } = this.panel.explorer, size = this.cell, pinned = this.panel.pinned();
    const box = ([query, key], color, width) => {
      const [y, height] = this.row(query), edge = width / 2; // inside its cell
      framed(context, [this.x(key) + edge, y + edge, size - width, height - width], color, width);
    };
    context.fillStyle = style.accent;
    for (let i = 1; state.top_k > 0 && i < this.n; i++) {
      for (const [j] of this.panel.strongest(i, state.top_k)) {
        if (size > 6) box([i, j], "#222", 1);
        else context.fillRect(this.x(j) - 0.5, this.y(i) - 0.5, size + 1, size + 1); // too small for a frame
      }
    }
    this.markBands(context, step ?? cell?.[0], step ?? cell?.[1]);
    if (pinned) box(pinned, style.accent, 2.5);
    if (this.panel.hover) box(this.panel.hover, style.accent, 1.5);
  }

  /** A row and a column that the reader looks at. */
  markBands(context, row, column) {
    if (row === undefined) return;
    const [y, height] = this.row(row), size = this.cell, { accent } = this.panel.explorer.style;
    const bands = [[this.x(0), y, (row + 1) * size, height], [this.x(column), this.y(column), size, (this.n - column) * size]];
    for (const band of bands) framed(context, band, accent, 1); // no tint, which would change what the colours say
  }

  /** Say beside the cell what is in it, and the texts of both of its steps. */
  tell(cell, told) {
    this.tipped = cell;
    this.tip.hidden = !cell;
    if (!cell) return;
    const { info } = this.panel, [query, key] = cell;
    this.tip.replaceChildren();
    node(this.tip, "div", "tip-value", told);
    const ways = query === key ? [["query", query, "on itself: "]] : [["query", query, ""], ["key", key, "draws on "]];
    for (const [name, step, verb] of ways) {
      const line = node(this.tip, "div", `tip-${name}`);
      node(line, "span", "tip-name", `${verb}${info.labels[step]} `);
      node(line, "span", "", clipped(info.texts[step], 240)).dir = "auto";
    }
  }

  /** Beside the cell and above its row, or below it where there is no room. */
  placeTip() {
    if (!this.tipped) return;
    const [query, key] = this.tipped, [y, height] = this.row(query), above = y - this.tip.offsetHeight - 8;
    Object.assign(this.tip.style, { left: `${this.x(key) + this.cell + 10}px`, top: `${above >= 0 ? above : y + height + 10}px` });
  }
}
