// The tokens inside a cell, where token maps were kept: names on both sides, a value under the pointer.

const NAMED_TOKENS = 200; // more than that have no names, and small squares

class Tokens {
  constructor(panel, parent) {
    this.panel = panel;
    this.frame = node(parent, "div", "token-frame");
    this.canvas = node(this.frame, "canvas", "tokens");
    this.readout = node(parent, "div", "token-readout");
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
  }

  /** Token spans of the zoomed cell. */
  block() {
    const { map, n, info, explorer: { state } } = this.panel, [zoomed, query, key] = state.zoom;
    return zoomed === map && query < n ? [info.token_spans[query], info.token_spans[key]] : null;
  }

  /** Say why there are no tokens to see. */
  refuse() {
    this.readout.hidden = false;
    this.readout.textContent = this.panel.info.no_tokens;
  }

  draw(positions) {
    const { explorer, map, info } = this.panel, all = explorer.maps.data[`${map}/tokens`], spans = all && this.block();
    this.canvas.hidden = this.readout.hidden = !spans;
    if (!spans) return;
    const [[q0, q1], [k0, k1]] = spans, [rows, columns] = [q1 - q0, k1 - k0];
    this.values = this.mean(all, packed(info.token_texts.length), spans, positions);
    const longest = Math.max(rows, columns), named = longest <= NAMED_TOKENS, room = named ? this.roomFor(spans) : 0;
    this.side = named ? Math.max(11, Math.min(18, Math.floor((MAP - room) / longest))) : 2;
    const context = sized(this.canvas, room + columns * this.side, room + rows * this.side);
    context.translate(room, room);
    this.paint(context, spans);
    if (named) this.name(context, spans);
    Object.assign(this, { room });
    Object.assign(this.canvas.dataset, { shape: `${rows}x${columns}`, side: this.side, room });
    const [query, key] = explorer.state.zoom.slice(1).map((step) => info.labels[step]);
    this.readout.textContent = `tokens of step ${query} (rows) on those of ${key} (columns); Esc closes`;
  }

  /** What is written of a token. */
  nameOf(t) { return clipped(this.panel.info.token_texts[t].replace(/\n/g, "⏎").trim() || "␣", 12); }

  /** CSS pixels for the longest name. */
  roomFor(spans) {
    return 10 + 7 * Math.max(2, ...spans.flatMap(([from, to]) => Array.from({ length: to - from }, (_, i) => this.nameOf(from + i).length)));
  }

  mean(all, size, [[q0, q1], [k0, k1]], positions) {
    const columns = k1 - k0, values = new Float32Array((q1 - q0) * columns);
    for (let i = 0; i < q1 - q0; i++) {
      for (let j = 0; j < columns && k0 + j <= q0 + i; j++) {
        for (const p of positions) values[i * columns + j] += all[p * size + at(q0 + i, k0 + j)] / positions.length;
      }
    }
    return values;
  }

  paint(context, [[q0, q1], [k0, k1]]) {
    const top = this.values.reduce((a, b) => Math.max(a, b), 0) || 1, { state, palettes } = this.panel.explorer;
    const toShade = shade(top / 1000, top, state.scale, SALIENCY), { side } = this;
    for (let i = 0; i < q1 - q0; i++) {
      for (let j = 0; j < k1 - k0 && k0 + j <= q0 + i; j++) {
        context.fillStyle = css(palettes[0][toShade(this.values[i * (k1 - k0) + j])]);
        context.fillRect(j * side, i * side, side, side);
      }
    }
  }

  /** Write the tokens beside their rows and, turned, above their columns. */
  name(context, [[q0, q1], [k0, k1]]) {
    const { side } = this;
    context.fillStyle = this.panel.explorer.style.ink;
    context.font = "10px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (let t = q0; t < q1; t++) context.fillText(this.nameOf(t), -4, (t - q0 + 0.5) * side);
    context.rotate(-Math.PI / 2);
    context.textAlign = "left";
    for (let t = k0; t < k1; t++) context.fillText(this.nameOf(t), 4, (t - k0 + 0.5) * side);
  }

  hover(event) {
    const spans = this.block();
    if (!spans) return;
    const [[q0, q1], [k0, k1]] = spans, box = this.canvas.getBoundingClientRect(), { side, room } = this;
    const i = Math.floor((event.clientY - box.top - room) / side), j = Math.floor((event.clientX - box.left - room) / side);
    if (i < 0 || j < 0 || i >= q1 - q0 || j >= k1 - k0) return;
    const [query, key] = [q0 + i, k0 + j].map((t) => JSON.stringify(this.panel.info.token_texts[t]));
    this.readout.textContent = `${query} ← ${key}: ${number(this.values[i * (k1 - k0) + j])}`;
  }
}
