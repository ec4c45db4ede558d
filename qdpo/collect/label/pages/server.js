// Requests to the server: the token, and failures as errors that say what to do.

const KEPT = "qdpo-token";

export class Overtaken extends Error {
  constructor(view) {
    super("This prompt was decided in another tab meanwhile. Nothing was overwritten; its current state is shown.");
    this.view = view;
  }
}

// Moves the token from the address into this tab's storage: a reload keeps it, a copied address does not show it.
export function takeToken() {
  const found = /^#token=([\w-]+)$/.exec(location.hash);
  if (!found) return;
  sessionStorage.setItem(KEPT, found[1]);
  history.replaceState(null, "", "/");
}

export const index = () => ask("/api/index");
export const item = (id, again) => ask(`/api/item?id=${encodeURIComponent(id)}${again ? "&again=1" : ""}`);
export const search = (text) => ask(`/api/search?q=${encodeURIComponent(text)}`);
export const decide = (wish) =>
  ask("/api/decide", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(wish) });

async function ask(path, how = {}) {
  const headers = { ...how.headers, "X-Qdpo-Token": sessionStorage.getItem(KEPT) ?? "" };
  let answer, value;
  try {
    answer = await fetch(path, { ...how, headers });
    value = await answer.json();
  } catch {
    throw new Error(
      "The server does not answer, so nothing was saved just now. Start the same command again and open the address " +
        "that it prints in this tab. What you have written is kept here.",
    );
  }
  if (answer.status === 401)
    throw new Error(
      "The server was restarted, or this address lacks its token, so nothing was saved just now. Open the address " +
        "that `qdpo label` printed in this tab. What you have written is kept here.",
    );
  if (answer.status === 409) throw new Overtaken(value);
  if (!answer.ok) throw new Error(value.error);
  return value;
}
