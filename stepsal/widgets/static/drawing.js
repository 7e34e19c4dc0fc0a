// How it is drawn: elements, canvases, colours. Texts of traces are untrusted: they only ever become textContent or
// characters on a canvas.

const MAP = 400, LEFT = 32, BOTTOM = 22, STRIP = 6; // CSS pixels: the map, room for labels beside and below it, roles
const THUMB = 44; // pixels of a thumbnail

const number = (x) => (x === 0 ? "0" : Math.abs(x) >= 0.001 && Math.abs(x) < 1000 ? x.toPrecision(3) : x.toExponential(2));
const percent = (x) => `${(100 * x).toFixed(100 * x < 9.95 ? 1 : 0)} %`;
const clipped = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

function node(parent, tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = `stepsal-${name}`;
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
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
  Object.assign(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) }); // forgets all settings
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.imageSmoothingEnabled = false;
  return context;
}

/** A frame that is seen on light and on dark cells: its colour on a wider white one. */
function framed(context, box, color, width) {
  for (const [stroke, wide] of [["rgba(255,255,255,.85)", width + 1.6], [color, width]]) {
    context.strokeStyle = stroke;
    context.lineWidth = wide;
    context.strokeRect(...box);
  }
}
