// Fills the page. Texts of prompts and answers are set through textContent only.

export const $ = (id) => document.getElementById(id);
const ROLES = { system: "System", user: "User", assistant: "Assistant", tool: "Tool" };
export const FILTERS = {
  undecided: ["Undecided", (kind) => kind === "undecided" || kind === "open"],
  open: ["Left open by a judge", (kind) => kind === "open"],
  all: ["All", () => true],
  decided: ["Decided", (kind) => kind !== "undecided" && kind !== "open"],
  edit: ["Edited", (kind) => kind === "edit"],
  tie: ["Ties", (kind) => kind === "tie"],
  skip: ["Skipped", (kind) => kind === "skip"],
  cut: ["With a cut answer", (kind, isCut) => isCut],
};
const count = (n) => n.toLocaleString("en");
const percent = (share) => `${Math.round(share * 100)} %`;

export function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

export function showTurns(turns) {
  const isSingle = turns.length === 1 && turns[0].role === "user";
  $("turns").replaceChildren(
    ...turns.map((turn) => {
      const box = element("div", `turn ${turn.role}`);
      if (!isSingle) box.append(element("span", "role", ROLES[turn.role] ?? turn.role));
      box.append(turn.text);
      return box;
    }),
  );
}

// One card an answer; `act` holds what its buttons do.
export function showAnswers(view, act) {
  $("answers-title").textContent =
    view.answers.length === 2 ? "Which answer is better?" : "Which answer is best, and which is worst?";
  $("answers").replaceChildren(...view.answers.map((answer, place) => card(answer, place, view, act)));
}

function card(answer, place, view, act) {
  const box = $("answer").content.cloneNode(true).firstElementChild;
  const name = `Answer ${place + 1}`;
  box.dataset.id = answer.id;
  box.setAttribute("aria-label", name);
  box.querySelector(".number").textContent = place + 1;
  box.querySelector("h3").textContent = answer.model ?? "";
  box.querySelector(".text").textContent = answer.text;
  if (answer.cut) box.querySelector(".text").append(element("span", "cut", "Cut by the length limit"));
  const label = (part, text, key, work) => {
    const button = box.querySelector(part);
    button.append(" ", element("kbd", "", key));
    button.setAttribute("aria-label", `${text}: ${name}`);
    button.addEventListener("click", () => work(answer.id));
    return button;
  };
  label(".best", "Best", place + 1, act.best);
  label(".worst", "Worst", `⇧ ${place + 1}`, act.worst).hidden = view.answers.length === 2;
  label(".edit", "Edit", "E", act.edit);
  box.querySelector("textarea").setAttribute("aria-label", `A better text in the place of answer ${place + 1}`);
  box.querySelector(".save").addEventListener("click", () => act.saveEdit(answer.id));
  box.querySelector(".leave").addEventListener("click", () => act.leaveEdit(answer.id));
  box.querySelector("textarea").addEventListener("input", (event) => act.draft(answer.id, event.target.value));
  return box;
}

export function showMarks(best, worst) {
  for (const box of $("answers").children) {
    const mark = box.dataset.id === best ? "best" : box.dataset.id === worst ? "worst" : "";
    box.classList.toggle("best", mark === "best");
    box.classList.toggle("worst", mark === "worst");
    box.querySelector(".mark").textContent = { best: "Best", worst: "Worst", "": "" }[mark];
    box.querySelector(".choices .best").setAttribute("aria-pressed", mark === "best");
    box.querySelector(".choices .worst").setAttribute("aria-pressed", mark === "worst");
  }
}

export function showEditor(id, text) {
  const box = cardOf(id);
  box.querySelector(".text").hidden = box.querySelector(".choices").hidden = text !== null;
  box.querySelector(".editor").hidden = text === null;
  if (text === null) return box.querySelector(".edit").focus();
  const area = box.querySelector("textarea");
  area.value = text;
  area.rows = Math.min(20, Math.max(5, Math.ceil(text.length / 48) + text.split("\n").length));
  area.focus();
}

export const cardOf = (id) => [...$("answers").children].find((box) => box.dataset.id === id);

// The current decision about this prompt, in a sentence.
export function showBanner(view) {
  const { decision } = view;
  const place = (id) => view.answers.findIndex((answer) => answer.id === id) + 1;
  const by = decision && decision.by !== "person" ? ` by ${decision.by}` : "";
  const said = decision && {
    pick: () => `Decided${by}: answer ${place(decision.best)} is best, answer ${place(decision.worst)} worst.`,
    edit: () => `Decided${by}: your text replaces answer ${place(decision.worst)}.`,
    tie: () => `Decided${by}: a tie.`,
    skip: () => `Skipped${by}.`,
    open: () => `Left open${by}${decision.note ? `: ${decision.note}` : "."}`,
  }[decision.kind]();
  const again = "Asked a second time, to measure how well you agree with yourself. Your choice changes no pair.";
  $("banner").hidden = !said && !view.again;
  $("banner").className = view.again ? "again" : (decision?.kind ?? "");
  $("banner-text").textContent = view.again ? again : (said ?? "");
  $("take-back").hidden = !decision || decision.kind === "open";
}

export function showProgress(state) {
  const total = state.rows.length;
  const left = (state.counts.undecided ?? 0) + (state.counts.open ?? 0);
  const done = total - left;
  $("out").textContent = state.out;
  $("progress-text").textContent = `${count(done)} of ${count(total)} decided`;
  $("bar").style.width = `${(100 * done) / total}%`;
  $("bar").parentElement.setAttribute("aria-valuemax", total);
  $("bar").parentElement.setAttribute("aria-valuenow", done);
  const kept = $("filter").value || "all";
  $("filter").replaceChildren(
    ...Object.entries(FILTERS).map(([name, [label, holds]]) => {
      const n = state.rows.reduce((sum, row) => sum + holds(row.kind, row.isCut), 0);
      const option = element("option", "", `${label} (${count(n)})`);
      option.value = name;
      return option;
    }),
  );
  $("filter").value = kept;
  $("undo").disabled = !state.last;
}

export function showPlace(at, total, isAgain) {
  $("place").textContent = isAgain ? "again" : total ? `${count(at + 1)} / ${count(total)}` : "none";
}

export function showFigures({ counts, habits }) {
  const pairs = (counts.pick ?? 0) + (counts.edit ?? 0);
  const figures = [["Pairs", count(pairs)], ["Ties", count(counts.tie ?? 0)], ["Skipped", count(counts.skip ?? 0)]];
  if (habits.median_seconds !== null) figures.push(["Time per decision", `${habits.median_seconds.toFixed(1)} s (median)`]);
  if (habits.places.length) {
    const shares = habits.places.map((place) => percent(place.share)).join(" · ");
    const chance = habits.places.map((place) => percent(place.chance));
    const expected = new Set(chance).size === 1 ? chance[0] : chance.join(" · ");
    figures.push(["Best by place", `${shares} (chance ${expected})`]);
  } else if (habits.decisions) figures.push(["Best by place", "from 20 picks on"]);
  if (habits.asked_again)
    figures.push(["Agreement with yourself", `${habits.agreed} of ${habits.asked_again} (${percent(habits.agreed / habits.asked_again)})`]);
  $("figures").replaceChildren(
    ...figures.map(([name, value]) => {
      const box = element("div");
      box.append(element("dt", "", name), element("dd", "", value));
      return box;
    }),
  );
  $("hint").hidden = !habits.hint;
  $("hint").textContent = habits.hint;
}
