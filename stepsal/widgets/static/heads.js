// The heads of a layer, where their maps were kept: small multiples, and which of them carry a cell.

const CARRIERS = 4; // heads that are named

class Heads {
  constructor(panel, parent) {
    this.panel = panel;
    this.root = node(parent, "div", "heads");
    this.root.hidden = !panel.info.n_heads;
    this.title = node(this.root, "div", "heads-of");
    this.canvas = node(this.root, "canvas", "head-maps");
    this.canvas.setAttribute("role", "img");
    this.carriers = node(this.root, "div", "carriers");
  }

  /** One layer at a time: heads of different layers have nothing in common but a number. */
  draw(positions) {
    const { info, metric, explorer } = this.panel, { state } = explorer;
    this.position = info.n_heads && positions.length === 1 && (metric === SHARE || metric === SALIENCY) ? positions[0] : null;
    this.canvas.hidden = this.position === null;
    if (!info.n_heads) return;
    this.title.textContent = this.position === null
      ? "heads: choose one layer, and saliency or shares, to see them"
      : `heads of layer ${info.layers[this.position]}, each with colours of its own`;
    if (this.position === null) return;
    this.pictures = Array.from({ length: info.n_heads }, (_, head) => this.picture(head, state));
    this.canvas.setAttribute("aria-label", `maps of the ${info.n_heads} heads of layer ${info.layers[this.position]}`);
  }

  picture(head, state) {
    const { map, n, metric, explorer } = this.panel, values = explorer.maps.head(map, this.position, head, metric === SHARE);
    const [low, high] = spread([values.subarray(1)], explorer.maps.floor), top = high || 1;
    const [small, rows] = shrunk(values, n, 2 * THUMB);
    return picture(small, rows, shade(low < top && low > 0 ? low : top / 10, top, state.scale, metric), explorer.palettes[0]);
  }

  mark(cell) {
    if (this.position === null || !this.panel.info.n_heads) return this.carriers.replaceChildren();
    const { map, explorer } = this.panel, parts = cell ? explorer.maps.carriers(map, this.position, cell) : [];
    this.paint(new Map(parts));
    this.carriers.textContent = !cell ? "point at a cell: the heads that carry it are framed and named" : parts[0][1] === 0
      ? "no head carries this cell"
      : `carried by ${parts.slice(0, CARRIERS).map(([h, x]) => `head ${h} (${percent(x)})`).join(", ")}`;
  }

  /** Frames are as strong as the part of the cell that a head carries. */
  paint(parts) {
    const { style } = this.panel.explorer, each = THUMB + 4, perRow = Math.floor((LEFT + MAP) / each);
    const context = sized(this.canvas, Math.min(this.pictures.length, perRow) * each, Math.ceil(this.pictures.length / perRow) * (each + 10));
    context.font = "9px system-ui, sans-serif";
    this.pictures.forEach((small, head) => {
      const left = (head % perRow) * each + 2, top = Math.floor(head / perRow) * (each + 10) + 2, part = parts.get(head) ?? 0;
      context.fillStyle = style.empty;
      context.fillRect(left, top, THUMB, THUMB);
      context.drawImage(small, left, top, THUMB, THUMB);
      context.strokeStyle = part ? style.accent : "rgba(128,128,128,.4)";
      context.lineWidth = 0.5 + 3.5 * part;
      context.strokeRect(left, top, THUMB, THUMB);
      context.fillStyle = style.ink;
      context.fillText(String(head), left + 1, top + each + 5);
    });
  }
}
