// Control flow of the page: showing prompts, handling keys, saving decisions.

import * as server from "./server.js";
import { $, FILTERS, cardOf, showAnswers, showBanner, showEditor, showFigures, showMarks, showPlace, showProgress, showTurns } from "./view.js";

const KEPT_PLACE = "qdpo-place";
const state = { rows: [], byId: new Map(), counts: {}, habits: null, last: null, again: null, out: "" };
let list = []; // ids that match filter and search, in the order of the files
let view = null; // the prompt that is shown
let best = null, worst = null, marksAreSaved = false, editing = null;
let isBusy = false, asksWhich = false;

// Unsaved work on a prompt is kept in this tab until it is saved: it survives a reload or a new server.
const draftOf = (id) => JSON.parse(sessionStorage.getItem(`qdpo-draft-${id}`) ?? "{}");
const forget = (id) => sessionStorage.removeItem(`qdpo-draft-${id}`);
const keep = (more) => sessionStorage.setItem(`qdpo-draft-${view.id}`, JSON.stringify({ ...draftOf(view.id), ...more }));

// Time while the page is visible.
const clock = { since: 0, spent: 0 };
const spent = () => (clock.spent + (document.hidden ? 0 : performance.now() - clock.since)) / 1000;
const restartClock = () => Object.assign(clock, { since: performance.now(), spent: 0 });
document.addEventListener("visibilitychange", () => {
  if (document.hidden) clock.spent += performance.now() - clock.since;
  else {
    clock.since = performance.now();
    guarded(refresh);
  }
});

const say = (text) => ($("status").textContent = text);

// One request at a time; an error is shown until a request succeeds.
async function guarded(work) {
  if (isBusy) return;
  isBusy = true;
  try {
    await work();
    $("alarm").hidden = true;
  } catch (error) {
    if (error instanceof server.Overtaken) {
      rowOf(error.view.id).count = error.view.count;
      rowOf(error.view.id).kind = error.view.decision?.kind ?? "undecided";
      await refresh();
      show(error.view);
    }
    $("alarm").textContent = error.message;
    $("alarm").hidden = false;
  } finally {
    isBusy = false;
  }
}

const rowOf = (id) => state.byId.get(id);
const readRow = ([id, kind, count, isCut]) => ({ id, kind, count, isCut });

async function refresh() {
  const { rows, ...figures } = await server.index();
  Object.assign(state, figures, { rows: rows.map(readRow) });
  state.byId = new Map(state.rows.map((row) => [row.id, row]));
  showProgress(state);
  showFigures(state);
}

function take(answer) {
  const { row, ...figures } = answer;
  Object.assign(rowOf(row[0]), readRow(row));
  Object.assign(state, figures);
  showProgress(state);
  showFigures(state);
}

async function applyFilter() {
  const holds = FILTERS[$("filter").value][1];
  const text = $("search").value.trim();
  const found = text ? new Set(await server.search(text)) : null;
  list = state.rows.filter((row) => holds(row.kind, row.isCut) && (!found || found.has(row.id))).map((row) => row.id);
  if (!list.includes(view?.id)) await open(list[0]);
  else showPlace(list.indexOf(view.id), list.length, view.again);
}

async function open(id, again = false) {
  if (id === undefined) return showNothing();
  show(await server.item(id, again));
}

function showNothing() {
  view = null;
  for (const part of document.querySelectorAll("main > section, .note, #dock .actions")) part.hidden = true;
  $("banner").hidden = true;
  $("nothing").hidden = false;
  showPlace(0, 0, false);
}

function show(shown) {
  view = shown;
  for (const part of document.querySelectorAll("main > section, .note, #dock .actions")) part.hidden = false;
  $("nothing").hidden = true;
  if (!view.again) {
    rowOf(view.id).count = view.count;
    sessionStorage.setItem(KEPT_PLACE, view.id);
  }
  const draft = view.again ? {} : draftOf(view.id);
  marksAreSaved = !draft.marks && view.decision !== null;
  [best, worst] = draft.marks ?? [view.decision?.best ?? null, view.decision?.worst ?? null];
  $("note").value = draft.note ?? (view.decision?.by === "person" ? view.decision.note : "");
  editing = null;
  asksWhich = false;
  $("prompt-title").textContent = `Prompt ${state.rows.findIndex((row) => row.id === view.id) + 1} of ${state.rows.length}`;
  showTurns(view.turns);
  showAnswers(view, act);
  showMarks(best, worst);
  showBanner(view);
  showPlace(list.indexOf(view.id), list.length, view.again);
  scrollTo(0, 0);
  $("prompt-title").focus({ preventScroll: true });
  if (draft.editing) act.edit(draft.editing);
  restartClock();
}

async function save(kind, more = {}, said = "") {
  const { id, again } = view;
  const seconds = Math.min(spent(), 86400);
  take(await server.decide({ prompt: id, kind, note: $("note").value, seconds, count: view.count, again, ...more }));
  forget(id);
  const next = state.again ?? undecidedAfter(id);
  if (next) await open(next, state.again !== null);
  else await open(id);
  const left = next ? "" : ` All ${state.rows.length.toLocaleString("en")} prompts are decided. Stop the server with Ctrl-C to see the next command.`;
  say(`Saved: ${said}.${left}`);
}

// The next undecided prompt: among those that match filter and search if there is one, else among all.
function undecidedAfter(id) {
  const isUndecided = (other) => other !== id && FILTERS.undecided[1](rowOf(other).kind);
  const ring = (ids) => [...ids.slice(ids.indexOf(id) + 1), ...ids.slice(0, Math.max(0, ids.indexOf(id)))];
  return ring(list).find(isUndecided) ?? ring(state.rows.map((row) => row.id)).find(isUndecided);
}

const placeOf = (id) => view.answers.findIndex((answer) => answer.id === id) + 1;

function mark(role, id) {
  if (editing || isBusy) return;
  // A new choice on a decided prompt clears both marks: else one key would overwrite half of the old decision.
  if (marksAreSaved) best = worst = null;
  marksAreSaved = false;
  if (view.answers.length === 2) {
    const twin = view.answers.find((answer) => answer.id !== id).id;
    [best, worst] = role === "best" ? [id, twin] : [twin, id];
  } else if (role === "best") [best, worst] = [best === id ? null : id, worst === id ? null : worst];
  else [best, worst] = [best === id ? null : best, worst === id ? null : id];
  showMarks(best, worst);
  if (!view.again) keep({ marks: [best, worst] });
  if (best && worst) guarded(() => save("pick", { best, worst }, `answer ${placeOf(best)} best, answer ${placeOf(worst)} worst`));
  else say(best ? `Answer ${placeOf(best)} is best. Which is worst?` : worst ? `Answer ${placeOf(worst)} is worst. Which is best?` : "");
}

const act = {
  best: (id) => mark("best", id),
  worst: (id) => mark("worst", id),
  edit(id) {
    if (view.again) return say("A prompt that is asked again cannot be edited. Pick an answer.");
    if (editing) act.leaveEdit(editing);
    editing = id;
    const draft = draftOf(view.id);
    const before = view.decision?.kind === "edit" && view.decision.worst === id ? view.decision.text : null;
    const text = draft.texts?.[id] ?? before ?? view.answers.find((answer) => answer.id === id).text;
    keep({ editing: id });
    showEditor(id, text);
    say("Ctrl+Enter saves the edit, Escape leaves it.");
  },
  draft: (id, text) => keep({ texts: { ...draftOf(view.id).texts, [id]: text } }),
  leaveEdit(id) {
    editing = null;
    keep({ editing: null });
    showEditor(id, null);
    say("The edit is not saved; its draft is kept in this tab.");
  },
  saveEdit(id) {
    const text = cardOf(id).querySelector("textarea").value;
    guarded(() => save("edit", { worst: id, text }, `your text over answer ${placeOf(id)}`));
  },
};

const tie = () => view && guarded(() => save("tie", {}, "a tie"));
const skip = () => view && guarded(() => save("skip", {}, "skipped"));
const takeBack = (id) =>
  guarded(async () => {
    take(await server.decide({ prompt: id, kind: "undo", count: rowOf(id).count }));
    await open(id);
    say("Undone: this prompt is as it was before.");
  });
const undo = () => (state.last ? takeBack(state.last) : say("There is nothing to undo."));

function step(by) {
  if (!list.length) return;
  const at = list.indexOf(view?.id);
  const to = at < 0 ? 0 : Math.min(list.length - 1, Math.max(0, at + by));
  guarded(() => open(list[to]));
}

function jump() {
  const next = undecidedAfter(view?.id) ?? (view && FILTERS.undecided[1](rowOf(view.id).kind) ? view.id : undefined);
  if (next) guarded(() => open(next));
  else say("Every prompt is decided.");
}

function startEdit() {
  const focused = document.activeElement?.closest(".answer")?.dataset.id;
  const id = focused ?? best;
  if (id) return act.edit(id);
  asksWhich = true;
  say("Which answer? Press its number.");
}

const openKeys = () => $("keys").showModal();
const KEYS = {
  e: startEdit, t: tie, s: skip, u: undo, g: jump, j: () => step(1), k: () => step(-1),
  arrowright: () => step(1), arrowleft: () => step(-1), n: () => $("note").focus(), "/": () => $("search").focus(),
};

function onKey(event) {
  const isWriting = event.target.closest("input:not([type=checkbox]), textarea, select");
  if (event.isComposing || event.keyCode === 229) return; // an input method is at work: its keys are not ours
  if (isWriting) return onKeyWhileWriting(event);
  if (event.ctrlKey || event.metaKey || event.altKey || $("keys").open) return;
  if (event.key === "?") return event.preventDefault(), openKeys();
  if (!view || !$("keys-on").checked) return;
  const digit = /^(?:Digit|Numpad)([1-9])$/.exec(event.code); // the key, whatever the layout makes of it with Shift
  const letter = /^Key([A-Z])$/.exec(event.code)?.[1].toLowerCase();
  const isLatin = /^[\x20-\x7e]$/.test(event.key);
  const work = KEYS[isLatin || !letter ? event.key.toLowerCase() : letter];
  if (digit) {
    const answer = view.answers[digit[1] - 1];
    if (!answer) return say(`There are ${view.answers.length} answers.`);
    event.preventDefault();
    if (asksWhich) return (asksWhich = false), act.edit(answer.id);
    return event.shiftKey ? act.worst(answer.id) : act.best(answer.id);
  }
  if (!work || event.repeat) return;
  event.preventDefault();
  work();
}

function onKeyWhileWriting(event) {
  const leaves = event.key === "Escape" || (event.key === "Enter" && event.target === $("note"));
  if (editing && event.target.matches("textarea")) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) act.saveEdit(editing);
    else if (event.key === "Escape") act.leaveEdit(editing);
  } else if (leaves && event.target !== $("filter")) {
    event.preventDefault();
    $("prompt-title").focus();
  }
}

function wire() {
  document.addEventListener("keydown", onKey);
  const clicks = { previous: () => step(-1), next: () => step(1), jump, tie, skip, undo, help: openKeys };
  for (const [id, work] of Object.entries(clicks)) $(id).addEventListener("click", work);
  $("take-back").addEventListener("click", () => takeBack(view.id));
  $("note").addEventListener("input", () => view && keep({ note: $("note").value }));
  $("filter").addEventListener("change", () => guarded(applyFilter));
  let waiting;
  $("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => guarded(applyFilter), 150);
  });
  document.querySelector(".tools").addEventListener("submit", (event) => {
    event.preventDefault();
    $("prompt-title").focus();
  });
  $("keys-on").checked = sessionStorage.getItem("qdpo-keys") !== "off";
  $("keys-on").addEventListener("change", () => sessionStorage.setItem("qdpo-keys", $("keys-on").checked ? "on" : "off"));
  addEventListener("hashchange", () => {
    server.takeToken();
    location.reload(); // the address of a restarted server was pasted into this tab
  });
}

async function start() {
  server.takeToken();
  wire();
  await guarded(async () => {
    await refresh();
    list = state.rows.map((row) => row.id);
    const kept = sessionStorage.getItem(KEPT_PLACE);
    const first = state.rows.find((row) => FILTERS.undecided[1](row.kind)) ?? state.rows[0];
    await open(rowOf(kept) ? kept : first.id);
  });
  document.body.dataset.ready = "yes";
}

start();
