// The start of an exported page: its stored numbers, a model without a kernel, and choices in the address.

const stored = JSON.parse(document.getElementById("state").textContent);
for (const [name, text] of Object.entries(stored.buffers)) {
  const characters = atob(text), bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  stored.buffers[name] = new DataView(bytes.buffer);
}
const first = Object.fromEntries(STATE.map((name) => [name, stored[name]]));
const listeners = {};
const model = {
  get: (name) => stored[name],
  set(name, value) {
    if (String(stored[name]) === String(value)) return;
    stored[name] = value;
    for (const each of listeners[`change:${name}`] ?? []) each();
  },
  save_changes: () => writeAddress(),
  on(event, each) { (listeners[event] ??= []).push(each); },
  off(event, each) { listeners[event] = (listeners[event] ?? []).filter((x) => x !== each); },
};

/** Choices that differ from those that the page begins with, as "layer=5&pinned=0.17.16". */
function addressOf() {
  const changed = STATE.filter((name) => String(stored[name]) !== String(first[name]));
  return changed.map((name) => `${name}=${Array.isArray(stored[name]) ? stored[name].join(".") : Number(stored[name])}`).join("&");
}

function writeAddress() {
  const address = addressOf();
  if (location.hash.slice(1) !== address) history.replaceState(null, "", address ? `#${address}` : location.pathname + location.search);
}

/** A choice in the address; undefined if it makes no sense here. */
function readChoice(name, text, trace) {
  const { maps, offered } = stored.scene, most = {
    trace: maps.length - 1, compare: maps.length, layer: maps[trace].layers.length - 1, band: BANDS.length - 1, scale: 1,
    shared: 1, top_k: 5, threshold: 50, view: 1,
  };
  if (!/^\d*(\.\d+)*$/.test(text)) return undefined;
  const numbers = text === "" ? [] : text.split(".").map(Number);
  if (name === "pinned" || name === "zoom") return readCell(name, numbers);
  if (numbers.length !== 1 || (name === "metric" ? !offered.includes(numbers[0]) : !(numbers[0] <= most[name]))) return undefined;
  return name === "shared" ? numbers[0] === 1 : numbers[0];
}

function readCell(name, numbers) {
  if (!numbers.length) return [];
  const [map, query, key] = numbers, info = stored.scene.maps[map];
  if (numbers.length !== 3 || !info || key > query || query >= info.roles.length) return undefined;
  return name === "zoom" && !stored.buffers[`${map}/tokens`] ? undefined : numbers;
}

/** Choose what the address says, and for the rest what the page began with. */
function readAddress() {
  const said = new Map(location.hash.slice(1).split("&").map((part) => part.split("=")));
  const trace = said.has("trace") ? readChoice("trace", said.get("trace") ?? "", first.trace) ?? first.trace : first.trace;
  for (const name of STATE) {
    const choice = said.has(name) ? readChoice(name, said.get(name) ?? "", trace) : undefined;
    model.set(name, choice ?? first[name]);
  }
  stored.slider = stored.layer;
}

readAddress();
render({ model, el: document.getElementById("explorer") });
addEventListener("hashchange", readAddress);
