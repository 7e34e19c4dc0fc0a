// The text of one trace beside its map: its steps, what the chosen one draws on, a search, and a ranking.

const RANKED = 5; // steps in the ranking

class Reading {
  constructor(panel, parent) {
    Object.assign(this, { panel, marked: [], shaded: null });
    this.buildSearch(node(parent, "div", "search"));
    this.buildSteps(parent);
    this.links = node(parent, "div", "links");
    this.ranking = node(parent, "div", "ranking");
    this.listen();
  }

  buildSearch(bar) {
    const { info } = this.panel;
    this.query = node(bar, "input", "search-words");
    Object.assign(this.query, { type: "search", placeholder: "search in steps", ariaLabel: `search in the steps of ${info.label}` });
    this.found = node(bar, "span", "search-count");
    for (const role of ["question", "summary"]) {
      const step = info.roles.indexOf(role);
      if (step < 0) continue;
      const button = node(bar, "button", `jump stepsal-jump-${role}`, `to ${info.labels[step]}`);
      Object.assign(button, { type: "button", title: `show the ${role}` });
      button.addEventListener("click", () => this.jump(step));
    }
    this.query.addEventListener("input", () => this.search());
    this.query.addEventListener("keydown", (event) => {
      event.stopPropagation(); // letters are words here, no commands
      if (event.key === "Enter") this.search(event.shiftKey ? -1 : 1);
    });
  }

  buildSteps(parent) {
    const { info } = this.panel;
    this.text = node(parent, "ol", "text");
    this.text.tabIndex = 0;
    this.text.setAttribute("aria-label", `steps of ${info.label}`);
    this.rows = info.texts.map((text, i) => {
      const row = node(this.text, "li", `step stepsal-${info.roles[i]}`);
      row.dataset.step = i;
      node(row, "span", "number", info.labels[i]);
      node(row, "span", "words", text).dir = "auto";
      return row;
    });
  }

  listen() {
    const { text, panel } = this, stepOf = (event) => event.target.closest(".stepsal-step")?.dataset.step;
    text.addEventListener("pointerover", (event) => stepOf(event) && panel.hoverStep(Number(stepOf(event))));
    text.addEventListener("pointerleave", () => panel.hoverStep(null));
    text.addEventListener("keydown", (event) => this.key(event));
    text.addEventListener("blur", () => panel.hoverStep(null));
  }

  key(event) {
    const by = { ArrowUp: -1, ArrowDown: 1 }[event.key], { panel } = this;
    if (!by || event.ctrlKey || event.metaKey || event.altKey) return;
    this.links.ariaLive = "polite";
    panel.hoverStep(Math.max(0, Math.min(panel.n - 1, panel.step === null ? 0 : panel.step + by)));
    this.show(panel.step);
    event.preventDefault();
  }

  /** Go to a step, in the text and in the map. */
  jump(step) {
    this.panel.hoverStep(step);
    this.show(step);
    this.panel.chart.reveal(step, Math.min(step, this.panel.hover?.[1] ?? 0));
  }

  /** Mark the steps that hold the words, and go to the first, or from the one shown to the next or the last before. */
  search(by = 0) {
    const words = this.query.value.trim().toLowerCase(), { texts } = this.panel.info;
    const hits = words ? [...texts.keys()].filter((i) => texts[i].toLowerCase().includes(words)) : [];
    this.rows.forEach((row, i) => row.classList.toggle("stepsal-hit", hits.includes(i)));
    this.hit = by && hits.length ? (this.hit + by + hits.length) % hits.length : 0;
    this.found.textContent = !words ? "" : hits.length ? `${this.hit + 1} of ${hits.length}` : "none";
    if (hits.length) this.jump(hits[this.hit]);
    else this.panel.hoverStep(null);
  }

  /** Scroll a step into sight, below the key step that sticks to the upper edge. */
  show(step, key = null) {
    const row = this.rows[step], top = row.offsetTop - this.text.offsetTop, seen = this.text.scrollTop;
    const stuck = key === null || key === step ? 0 : this.rows[key].offsetHeight;
    if (top < seen + stuck || top + row.offsetHeight > seen + this.text.clientHeight) {
      this.text.scrollTop = top - Math.max(stuck + 4, this.text.clientHeight / 3);
    }
  }

  mark(cell, step, links) {
    for (const row of this.marked) row.classList.remove("stepsal-query", "stepsal-key", "stepsal-hovered");
    this.marked = [...(cell ?? []), ...(step === null ? [] : [step])].map((i) => this.rows[i]);
    if (cell) {
      this.rows[cell[0]].classList.add("stepsal-query");
      this.rows[cell[1]].classList.add("stepsal-key");
    }
    if (step !== null) this.rows[step].classList.add("stepsal-hovered");
    this.shadeSteps(links?.about ?? null);
    this.tellLinks(links);
    if (cell && !this.text.matches(":hover, :focus")) this.show(...cell); // last, since it asks for the layout
  }

  /** Shade each step by what the chosen one draws from it. */
  shadeSteps(about) {
    const { values } = this.panel;
    if (this.shaded === about && this.of === values) return;
    let sum = 0;
    for (let j = 0; about !== null && j <= about; j++) sum += Math.abs(values[at(about, j)]);
    this.rows.forEach((row, j) => {
      const share = about === null || j > about || !sum ? 0 : Math.abs(values[at(about, j)]) / sum;
      const drawn = 5 * Math.round(13 * Math.sqrt(share)); // in few steps, so that few rows change
      if (drawn !== (row.drawn ?? 0)) row.style.setProperty("--stepsal-drawn", `${(row.drawn = drawn)}%`);
    });
    Object.assign(this, { shaded: about, of: values });
  }

  tellLinks(links) {
    this.links.replaceChildren();
    if (!links) return;
    const { labels } = this.panel.info;
    for (const [way, verb] of [["incoming", "draws on"], ["outgoing", "is drawn on by"]]) {
      const list = node(this.links, "div", way, `${labels[links.about]} ${verb} `);
      node(list, "b", "", links[way].map(([i, x]) => `${labels[i]} (${number(x)})`).join(", ") || "nothing");
    }
  }

  rank() {
    const { explorer, map, info } = this.panel;
    this.ranking.replaceChildren();
    const ranked = explorer.maps.ranking(map, explorer.state, RANKED);
    if (!ranked.length) return;
    node(this.ranking, "span", "", "most drawn on by later steps: ").title = "the sum of the shares that later rows have on a step";
    for (const [step, sum, later] of ranked) {
      const button = node(this.ranking, "button", "ranked", `${info.labels[step]} (${sum.toFixed(2)})`);
      Object.assign(button, { type: "button", title: `${sum.toFixed(2)} rows' worth, of ${later}; click shows the step` });
      button.addEventListener("click", () => this.jump(step));
    }
  }
}
