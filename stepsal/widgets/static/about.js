// What a reader who was sent a page has to know: whose maps these are, and how they are read.

const HOW_TO_READ = [
  "Each row of the map is a step while it is written (the query), each column a step that it looks back on (the key): Q is the question, numbers are steps of the thinking, S is the summary. The half above the diagonal is the future.",
  "The darker a cell, the more the row's step draws on the column's. A dark diagonal: steps draw on themselves and the step before (lock-in). A last row that is pale over the thinking: the summary does not use the reasoning (decay).",
  "Colours begin at a low quantile of what is shown and end at its largest value. The first cell of all is left out of that: a question that is alone in its row has all of it.",
];
const MEANING = {
  token: "saliency is attention times the gradient of each token's loss, its size, averaged over heads",
  sequence: "saliency is attention times the gradient of the loss of the whole sequence, its size, averaged over heads",
  logit: "saliency is attention times the gradient of each token's logit, its size, averaged over heads",
  attention: "the maps are attention itself, without a gradient",
};
const REDUCED = { density: "a cell is the mean over its pairs of tokens", mass: "a cell is the sum over key tokens, averaged over query tokens" };

/** Facts of an exported page: model, question, verdict of each trace, date. */
function buildFacts(parent, { maps, page }) {
  const head = node(parent, "header", "facts"), models = [...new Set(maps.map((map) => map.model))];
  node(head, "h1", "heading", page.title);
  const list = node(head, "dl", "fact-list");
  const fact = (name, text) => {
    const pair = node(list, "div", `fact stepsal-fact-of-${name}`);
    node(pair, "dt", "", name);
    node(pair, "dd", `fact-${name}`, text).dir = "auto";
  };
  fact("model", models.join(", "));
  fact("verdict", verdict(maps, page.verdicts));
  fact("date", page.date);
  const questions = [...new Set(maps.map((map) => map.question))];
  for (const question of questions) {
    const whose = maps.filter((map) => map.question === question).map((map) => map.label).join(", ");
    fact("question", questions.length > 1 ? `${whose}: ${question}` : question);
  }
}

/** What was said of the answers; labels say something too where there are several. */
function verdict(maps, verdicts) {
  const each = maps.map(({ label }, i) => (verdicts[i] ? `${label}: ${verdicts[i]}` : label));
  return maps.length > 1 || verdicts[0] ? each.join(" · ") : "not given";
}

function buildHowToRead(parent, { maps }, open) {
  const details = node(parent, "details", "how-to-read");
  details.open = open;
  node(details, "summary", "", "How to read this");
  for (const text of HOW_TO_READ) node(details, "p", "", text);
  for (const { target, reduce } of new Map(maps.map((map) => [`${map.target}/${map.reduce}`, map])).values()) {
    node(details, "p", "", `Of these maps: ${MEANING[target] ?? target}; ${REDUCED[reduce] ?? reduce}. Shares are parts of a row, which sum to 1.`);
  }
}
