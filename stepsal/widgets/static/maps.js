// What is shown: the maps of a scene, and what metrics make of them, computed as in scene.py and called the same.
//
// A model has get(name), set(name, value), save_changes(), on("change:name", f), off("change:name", f). Its state:
//
//   scene    {maps: [{label, roles, texts, layers, bands, profile, token_texts, token_spans, ...}], colors, names, ...}
//   buffers  "<map>/saliency", "<map>/attention", "<map>/tokens": float32, per layer the lower triangle, row by row;
//            "<map>/heads": per layer and head
//   trace, band, metric, scale, view: indices; compare: index + 1, or 0 for none; layer: position in the trace's layers;
//   slider: what the layer slider says; shared, top_k, threshold (per cent of a row)
//   pinned   [map, query step, key step] or []; zoom the same

const SHARE = 0, SALIENCY = 1, DIFFERENCE = 2, ATTENTION = 3; // metrics
const BANDS = ["layer", "shallow", "middle", "deep"];
const STATE = ["trace", "compare", "layer", "band", "metric", "scale", "shared", "top_k", "threshold", "view", "pinned", "zoom"];
const KEPT = 6e7; // numbers that are kept for later

const packed = (n) => (n * (n + 1)) / 2;
const at = (i, j) => (i * (i + 1)) / 2 + j;

function floats(view) {
  if (!view) return null;
  if (view.byteOffset % 4 === 0) return new Float32Array(view.buffer, view.byteOffset, view.byteLength / 4);
  return new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

/** Divide each row of a packed map by its sum. */
function toShares(values, n) {
  for (let i = 0, first = 0; i < n; first += ++i) {
    let sum = 0;
    for (let c = first; c <= first + i; c++) sum += values[c];
    if (sum > 0) for (let c = first; c <= first + i; c++) values[c] /= sum;
  }
  return values;
}

/** The maps of a scene, and what metrics make of them; results are kept. */
class Maps {
  constructor(scene, buffers) {
    this.maps = scene.maps;
    this.floor = scene.quantile_floor;
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
      return metric === SHARE ? toShares(mean, n) : mean;
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
      const [quantile, top] = spread(shown.map((values) => values.subarray(1)), this.floor); // without the corner
      if (metric === DIFFERENCE) return [-top || -1, top || 1];
      if (top === 0) return [0, 1];
      return [state.scale === 1 ? 0 : quantile < top ? quantile : top / 10, top];
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

  /** Steps that later steps draw on most: sums of their shares, and how many later steps there are. */
  ranking(map, state, most) {
    const { roles } = this.maps[map], positions = this.chosen(map, state), sums = new Float64Array(roles.length);
    const ofAttention = this.metric(map, state) === ATTENTION;
    const shares = ofAttention ? toShares(this.mean(map, ATTENTION, positions).slice(), roles.length) : this.mean(map, SHARE, positions);
    for (let i = 1, c = 1; i < roles.length; i++, c++) for (let j = 0; j < i; j++, c++) sums[j] += shares[c];
    const order = Array.from(sums.keys()).filter((j) => sums[j] > 0).sort((a, b) => sums[b] - sums[a]);
    return order.slice(0, most).map((j) => [j, sums[j], roles.length - 1 - j]);
  }

  /** The map of one head of a layer, by its position: the numbers themselves, or shares of their rows. */
  head(map, position, head, share) {
    const n = this.maps[map].roles.length, size = packed(n), first = (position * this.maps[map].n_heads + head) * size;
    const values = this.data[`${map}/heads`].subarray(first, first + size);
    return share ? this.remember(["head", map, position, head].join("/"), () => toShares(values.slice(), n)) : values;
  }

  /** Heads by the part of a cell that they carry, the largest first. */
  carriers(map, position, [query, key]) {
    const parts = Array.from({ length: this.maps[map].n_heads }, (_, h) => [h, this.head(map, position, h, false)[at(query, key)]]);
    const sum = parts.reduce((total, [, x]) => total + x, 0);
    return parts.map(([h, x]) => [h, sum > 0 ? x / sum : 0]).sort((a, b) => b[1] - a[1]);
  }
}

/**
 * A quantile of the sizes that are not zero, as numpy.quantile has it, and the largest: radix selection on the bits of
 * float32, which sort as sizes do.
 */
function spread(arrays, share) {
  const counts = new Uint32Array(1 << 15);
  const all = arrays.map((values) => new Int32Array(values.buffer, values.byteOffset, values.length));
  let n = 0, top = 0;
  for (const bits of all) {
    for (let i = 0; i < bits.length; i++) {
      const size = bits[i] & 0x7fffffff;
      if (size === 0) continue;
      counts[size >>> 16]++;
      n++;
      if (size > top) top = size;
    }
  }
  if (n === 0) return [0, 0];
  const place = share * (n - 1), low = Math.floor(place), weight = place - low;
  const [bin, left] = binOf(counts, low), sizes = sortedBin(all, bin);
  const next = left + 1 < sizes.length ? sizes[left + 1] : low + 1 < n ? sortedBin(all, binOf(counts, low + 1)[0])[0] : sizes[left];
  const [below, above, highest] = floatsOf(sizes[left], next, top);
  return [below + (above - below) * weight, highest];
}

/** The bin of a place in the order of all sizes, and the place within it. */
function binOf(counts, place) {
  let left = place, bin = 0;
  while (left >= counts[bin]) left -= counts[bin++];
  return [bin, left];
}

/** Sizes of a bin as bits, without zeros, in order. */
function sortedBin(all, bin) {
  const inside = [];
  for (const bits of all) {
    for (let i = 0; i < bits.length; i++) {
      const size = bits[i] & 0x7fffffff;
      if (size >>> 16 === bin && size !== 0) inside.push(size);
    }
  }
  return new Uint32Array(inside).sort();
}

function floatsOf(...bits) {
  return new Float32Array(Uint32Array.from(bits).buffer);
}
