// The page of `qdpo label`. Text of models and people reaches the page through textContent alone.
"use strict";

const $ = (id) => document.getElementById(id);
const store = sessionStorage;
const page = { prompts: [], byId: new Map(), found: null, shown: null, best: null, worst: null, editing: null, busy: false };
const clock = { since: 0, spent: 0 };

async function ask(path, body) {
  const options = { headers: { "X-Qdpo-Token": store.getItem("qdpo-token") || "" }, cache: "no-store" };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. What was said to be saved is saved. Start the same command again " +
      "and open the address that it prints; an edit that you have begun stays in this tab if the port is the same.");
  }
  const answer = await response.json();
  if (!response.ok) throw Object.assign(new Error(answer.error), { status: response.status });
  $("trouble").hidden = true;
  return answer;
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function say(text) { $("status").textContent = text; }

function trouble(error) {
  $("trouble").textContent = error.message;
  $("trouble").hidden = false;
}

// One thing at a time: a second key while a decision is being written is not a second decision.
async function alone(work) {
  if (page.busy) return;
  page.busy = true;
  try { await work(); } catch (error) { trouble(error); } finally { page.busy = false; }
}

// The list

function matches(prompt) {
  const filter = $("filter").value;
  if (page.found && !page.found.has(prompt.id)) return false;
  if (filter === "all") return true;
  if (filter === "cut") return prompt.cut;
  if (filter === "noted") return prompt.note;
  return prompt.state === filter;
}

const isOpen = (prompt) => prompt.state === "undecided" || prompt.state === "open";

// The nearest prompt before or after the shown one that fits; from the other end where there is none.
function neighbour(step, fits) {
  const count = page.prompts.length;
  const from = page.shown ? page.byId.get(page.shown.id) : -1;
  for (let way = 1; way <= count; way += 1) {
    const prompt = page.prompts[(from + step * way + count * 2) % count];
    if (fits(prompt) && (!page.shown || prompt.id !== page.shown.id)) return prompt.id;
  }
  return null;
}

async function move(step, fits, none) {
  const id = neighbour(step, fits);
  if (id) await show(id);
  else say(none);
}

function place() {
  const among = page.prompts.filter(matches);
  const at = page.shown ? among.findIndex((prompt) => prompt.id === page.shown.id) : -1;
  $("place").textContent = among.length === 0 ? "No prompt fits the filter"
    : at < 0 ? `${among.length} prompts fit; this one does not` : `Prompt ${at + 1} of ${among.length}`;
}

function stats(found) {
  const states = found.states;
  const left = (states.undecided || 0) + (states.open || 0);
  $("bar").max = found.total;
  $("bar").value = found.total - left;
  const parts = [`${found.total - left} of ${found.total} decided`, `${found.pairs} pairs`];
  if (states.open) parts.push(`${states.open} left open by a judge`);
  if (found.median_seconds !== null) parts.push(`${found.median_seconds.toFixed(1)} s a decision (median)`);
  if (found.agreement.asked) parts.push(`agreed with yourself in ${found.agreement.same} of ${found.agreement.asked}`);
  $("counts").textContent = parts.join(" · ");
  const picks = found.places.reduce((sum, one) => sum + one.picked, 0);
  $("bias").textContent = picks < 10 ? "" : "Best by place: " + found.places.map((one, place) =>
    `${place + 1}: ${Math.round(100 * one.picked / picks)} % (by chance ${Math.round(100 * one.expected / picks)} %)`).join(" · ")
    + (found.bias ? ` — ${found.bias}` : "");
}

// One prompt

async function show(id, { focus = true, again = false } = {}) {
  const view = await ask(`/api/prompt/${encodeURIComponent(id)}${again ? "?again" : ""}`);
  page.shown = view;
  page.best = page.worst = page.editing = null;
  const decision = view.decision;
  if (decision) {
    page.best = decision.best;
    page.worst = decision.worst;
  }
  store.setItem("qdpo-shown", id);
  $("again").hidden = !view.again;
  $("note").value = store.getItem(`note ${id}`) ?? (decision ? decision.note : "");
  $("prompt").replaceChildren(...view.turns.map((turn) => {
    const made = element("div", `turn ${turn.role}`);
    if (view.turns.length > 1) made.append(element("p", "role", turn.role));
    made.append(element("div", "text", turn.content));
    return made;
  }));
  draw();
  place();
  clock.spent = 0;
  clock.since = document.hidden ? 0 : performance.now();
  if (decision) say(described(decision));
  if (focus) {
    $("prompt").focus({ preventScroll: true });
    scrollTo({ top: 0 });
  }
}

function described(decision) {
  const number = (id) => page.shown.answers.findIndex((answer) => answer.id === id) + 1;
  const by = decision.by === "person" ? "" : ` by ${decision.by}`;
  const what = {
    pick: () => `answer ${number(decision.best)} is best, answer ${number(decision.worst)} worst`,
    edit: () => `answer ${number(decision.worst)} was edited into a better one`,
    tie: () => "a tie",
    skip: () => "skipped",
    open: () => `left open${decision.note ? `: ${decision.note}` : ""}`,
  }[decision.kind];
  return `Decided${by}: ${what()}.`;
}

function draw() {
  const view = page.shown;
  const edited = view.decision && view.decision.kind === "edit" ? view.decision : null;
  $("answers").replaceChildren(...view.answers.map((answer, place) => {
    const number = place + 1;
    const isBest = answer.id === page.best, isWorst = answer.id === page.worst;
    const item = element("li", `answer${isBest ? " best" : ""}${isWorst ? " worst" : ""}`);
    item.dataset.id = answer.id;
    item.tabIndex = -1;
    item.setAttribute("aria-label", `Answer ${number}${isBest ? ", best" : ""}${isWorst ? ", worst" : ""}`);
    const head = element("div", "head");
    head.append(element("span", "number", `Answer ${number}`));
    if (isBest || isWorst) head.append(element("span", "verdict", isBest ? "best" : edited ? "rejected" : "worst"));
    const facts = element("span", "facts", [answer.model, answer.tokens === null ? "" : `${answer.tokens} tokens`]
      .filter(Boolean).join(" · "));
    if (answer.cut) facts.append(" ", element("span", "cut", "cut at the length limit"));
    head.append(facts);
    item.append(head, element("div", "text", answer.text));
    if (edited && isWorst) {
      const better = element("div", "edited");
      better.append(element("p", "verdict", "Your edit, chosen:"), element("div", "text", edited.text));
      item.append(better);
    }
    item.append(page.editing === answer.id ? editor(answer) : buttons(answer, number, isBest, isWorst));
    return item;
  }));
}

function buttons(answer, number, isBest, isWorst) {
  const made = element("div", "buttons");
  const add = (label, key, className, pressed, act) => {
    const button = element("button", className, `${label} `);
    button.type = "button";
    button.append(element("kbd", "", key));
    button.setAttribute("aria-label", `${label} answer ${number}`);
    if (pressed !== null) button.setAttribute("aria-pressed", String(pressed));
    button.addEventListener("click", () => alone(act));
    made.append(button);
  };
  add("Best", `${number}`, "mark-best", isBest, () => mark("best", answer.id));
  add("Worst", `⇧${number}`, "mark-worst", isWorst, () => mark("worst", answer.id));
  add("Edit", "E", "edit", null, () => edit(answer.id));
  return made;
}

// Decisions

async function mark(side, id) {
  const other = side === "best" ? "worst" : "best";
  page.editing = null;
  if (page.shown.decision && page.shown.decision.kind === "edit") page.worst = page.best = null;
  page[side] = id;
  if (page[other] === id) page[other] = null;
  if (page.shown.answers.length === 2) page[other] = page.shown.answers.find((answer) => answer.id !== id).id;
  draw();
  const current = page.shown.decision;
  const same = current && current.kind === "pick" && current.best === page.best && current.worst === page.worst;
  if (page.best && page.worst && !same) await decide({ kind: "pick", best: page.best, worst: page.worst });
  else if (same) say(described(current));
  else say(`Answer ${page.shown.answers.findIndex((answer) => answer.id === id) + 1} is ${side}. Now the ${other} one.`);
}

function spent() { return (clock.spent + (clock.since ? performance.now() - clock.since : 0)) / 1000; }

async function decide(decision) {
  const view = page.shown;
  const asked = { prompt: view.id, count: view.count, again: view.again, note: $("note").value.trim(), seconds: spent(), ...decision };
  let done;
  try {
    done = await ask("/api/decide", asked);
  } catch (error) {
    if (error.status !== 409) throw error;
    await refresh();
    await show(view.id);
    say("This prompt was decided in another tab meanwhile. This is how it stands; decide anew to change it.");
    return;
  }
  store.removeItem(`note ${view.id}`);
  if (decision.kind === "edit") store.removeItem(`draft ${view.id} ${decision.worst}`);
  Object.assign(page.prompts[page.byId.get(view.id)], done.entry);
  stats(done.stats);
  if (decision.kind === "undo") {
    await show(view.id);
    say("Undone.");
    return;
  }
  const next = done.again || neighbour(1, (prompt) => matches(prompt) && isOpen(prompt))
    || ($("filter").value === "all" && !page.found ? null : neighbour(1, matches));
  const what = { pick: "Saved", edit: "Saved your edit", tie: "Saved as a tie", skip: "Skipped" }[decision.kind];
  if (next) {
    await show(next, { again: next === done.again });
    say(`${what}.`);
  } else {
    await show(view.id);
    say(`${what}. Every prompt ${$("filter").value === "all" && !page.found ? "" : "that fits "}is decided.`);
  }
}

// The decision about the shown prompt; where there is none, the one that a person took last.
async function undo() {
  const shown = page.shown.decision;
  if (!shown || shown.kind === "open") {
    const found = await ask("/api/prompts");
    take(found);
    if (!found.last) { say("There is nothing to undo."); return; }
    await show(found.last);
  }
  await decide({ kind: "undo", seconds: null, note: "" });
}

// Editing

function edit(id) {
  page.editing = id;
  draw();
  const area = document.querySelector("textarea");
  area.focus();
  area.setSelectionRange(area.value.length, area.value.length);
  say("Editing. Ctrl+Enter saves, Escape leaves.");
}

function editor(answer) {
  const key = `draft ${page.shown.id} ${answer.id}`;
  const made = element("form", "editor");
  const area = element("textarea");
  const current = page.shown.decision;
  const before = current && current.kind === "edit" && current.worst === answer.id ? current.text : answer.text;
  area.value = store.getItem(key) ?? before;
  area.setAttribute("aria-label", "A better answer");
  area.addEventListener("input", () => store.setItem(key, area.value));
  const save = () => alone(async () => {
    if (!area.value.trim()) { say("There is nothing in the answer yet."); return; }
    if (area.value === answer.text) { say("The answer is as it was. Change it, or press Escape."); return; }
    await decide({ kind: "edit", worst: answer.id, text: area.value });
  });
  area.addEventListener("keydown", (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); save(); }
    if (event.key === "Escape") { event.preventDefault(); leave(); }
  });
  const leave = () => { page.editing = null; draw(); $("prompt").focus(); say("Left. The draft is kept."); };
  const row = element("div", "buttons");
  const keep = element("button", "", "Save edit");
  keep.type = "submit";
  const cancel = element("button", "", "Leave");
  cancel.type = "button";
  cancel.addEventListener("click", leave);
  row.append(keep, cancel);
  made.append(area, row);
  made.addEventListener("submit", (event) => { event.preventDefault(); save(); });
  return made;
}

function toEdit() {
  const focused = document.activeElement && document.activeElement.closest(".answer");
  return (focused && focused.dataset.id) || page.best || page.worst || page.shown.answers[0].id;
}

// Keys: none of them while something is being typed, or composed with an input method.

const KEYS = {
  e: () => edit(toEdit()),
  t: () => decide({ kind: "tie" }),
  s: () => decide({ kind: "skip" }),
  u: undo,
  j: () => move(1, matches, "There is no other prompt."),
  k: () => move(-1, matches, "There is no other prompt."),
  arrowright: () => KEYS.j(),
  arrowleft: () => KEYS.k(),
  g: () => move(1, isOpen, "Every other prompt is decided."),
  n: () => $("note").focus(),
  "/": () => $("search").focus(),
  "?": () => $("keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select, dialog");
  if (event.key === "Escape" && typing && !event.target.closest("dialog, textarea")) { $("prompt").focus(); return; }
  if (event.isComposing || event.keyCode === 229 || typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (!page.shown || event.repeat) return;
  const digit = /^(?:Digit|Numpad)([1-9])$/.exec(event.code);
  const answer = digit && page.shown.answers[Number(digit[1]) - 1];
  const act = answer ? () => mark(event.shiftKey ? "worst" : "best", answer.id) : digit ? null : KEYS[event.key.toLowerCase()];
  if (!act) return;
  event.preventDefault();
  alone(async () => act());
});

// Start

function take(found) {
  page.prompts = found.prompts;
  page.byId = new Map(found.prompts.map((prompt, place) => [prompt.id, place]));
  stats(found.stats);
}

async function refresh() { take(await ask("/api/prompts")); }

async function find() {
  const text = $("search").value.trim();
  page.found = text ? new Set((await ask("/api/search", { text })).ids) : null;
  const fits = page.shown && matches(page.prompts[page.byId.get(page.shown.id)]);
  place();
  if (!fits) await move(1, matches, "No prompt fits.");
}

async function start() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token) {
    store.setItem("qdpo-token", token);
    history.replaceState(null, "", location.pathname);
  }
  const found = await ask("/api/prompts");
  take(found);
  const kept = store.getItem("qdpo-shown");
  const first = page.prompts.find(isOpen) || page.prompts[0];
  await show(kept && page.byId.has(kept) ? kept : first.id, { focus: false });
  document.body.dataset.ready = "true";
}

let waiting = 0;
$("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => alone(find), 200); });
$("filter").addEventListener("change", () => alone(find));
$("find").addEventListener("submit", (event) => { event.preventDefault(); alone(find); });
$("note").addEventListener("input", () => store.setItem(`note ${page.shown.id}`, $("note").value));
$("note").addEventListener("keydown", (event) => { if (event.key === "Enter" && !event.isComposing) $("prompt").focus(); });
for (const [id, key] of Object.entries({ tie: "t", skip: "s", undo: "u", previous: "k", next: "j", undecided: "g" })) {
  $(id).addEventListener("click", () => alone(async () => KEYS[key]()));
}
$("help").addEventListener("click", () => $("keys").showModal());
document.addEventListener("visibilitychange", () => {
  if (document.hidden) { clock.spent = spent() * 1000; clock.since = 0; } else clock.since = performance.now();
});
addEventListener("hashchange", () => location.reload()); // the address of another start, put into this tab
alone(start);
