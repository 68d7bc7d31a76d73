"use strict";
// Titles come from people and files: they enter the page as text only, never as markup.

const byId = (id) => document.getElementById(id);
const search = byId("search"), options = byId("options"), chosen = byId("history");
let history = [], found = [], active = -1, asked = 0, token = "";

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

async function call(path, body) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const sent = body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers };
  const response = await fetch(path, sent);
  if (response.status === 401) byId("login").hidden = false;
  const answer = await response.json().catch(() => ({ detail: `the server answered ${response.status}` }));
  if (!response.ok) throw new Error(answer.detail);
  return answer;
}

function tell(problem) {
  byId("problem").textContent = problem ? `This did not work: ${problem.message}` : "";
  byId("problem").hidden = !problem;
}

// The list under the field of search.

let wait;
search.addEventListener("input", () => {
  clearTimeout(wait);
  wait = setTimeout(suggest, 120);
});

async function suggest() {
  const text = search.value.trim();
  if (!text) return close();
  try {
    const answer = await call(`/titles?q=${encodeURIComponent(text)}`);
    if (text !== search.value.trim()) return; // a later letter is on its way
    found = answer.titles;
    tell(null);
  } catch (error) {
    tell(error);
    return;
  }
  active = found.length ? 0 : -1;
  options.replaceChildren(...found.map((title, at) => {
    const item = element("li", title);
    item.id = `option-${at}`;
    item.setAttribute("role", "option");
    item.addEventListener("mousedown", (event) => { event.preventDefault(); add(title); });
    return item;
  }));
  if (!found.length) options.replaceChildren(element("li", "No title has these letters.", "muted"));
  options.hidden = false;
  search.setAttribute("aria-expanded", "true");
  mark();
}

function mark() {
  [...options.children].forEach((item, at) => item.setAttribute("aria-selected", String(at === active)));
  if (active < 0) search.removeAttribute("aria-activedescendant");
  else {
    search.setAttribute("aria-activedescendant", `option-${active}`);
    options.children[active].scrollIntoView({ block: "nearest" });
  }
}

function close() {
  options.hidden = true;
  options.replaceChildren();
  found = [];
  active = -1;
  search.setAttribute("aria-expanded", "false");
  search.removeAttribute("aria-activedescendant");
}

search.addEventListener("keydown", (event) => {
  const steps = { ArrowDown: 1, ArrowUp: -1 };
  if (event.key in steps && found.length) {
    event.preventDefault();
    active = (active + steps[event.key] + found.length) % found.length;
    mark();
  } else if (event.key === "Enter" && active >= 0) {
    event.preventDefault();
    add(found[active]);
  } else if (event.key === "Escape") close();
});
search.addEventListener("blur", close);

// The history.

function add(title) {
  history.push(title);
  search.value = "";
  close();
  show();
}

function show() {
  chosen.replaceChildren(...history.map((title, at) => {
    const item = element("li"), remove = element("button", "×");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove ${title}`);
    remove.addEventListener("click", () => { history.splice(at, 1); show(); search.focus(); });
    item.append(element("span", title), remove);
    return item;
  }));
  byId("empty").hidden = byId("clear").hidden = history.length > 0;
  byId("clear").hidden = !history.length;
  recommend();
}

byId("clear").addEventListener("click", () => { history = []; show(); search.focus(); });

// The two rankings.

const selects = [byId("stage-0"), byId("stage-1")], rankings = [byId("ranking-0"), byId("ranking-1")];
selects.forEach((select) => select.addEventListener("change", recommend));

async function recommend() {
  const number = ++asked;
  if (!history.length) {
    rankings.forEach((list) => list.replaceChildren());
    byId("status").textContent = "";
    tell(null);
    return;
  }
  rankings.forEach((list) => list.classList.add("old"));
  byId("status").textContent = "Ranking the catalogue …";
  const stages = selects.map((select) => select.value);
  try {
    const answer = await call("/recommend", { history, stages });
    if (number !== asked) return; // the history has changed meanwhile
    const [before, after] = answer.rankings.map((one) => one.recommendations);
    fill(rankings[0], before);
    fill(rankings[1], after, before.map((one) => one.title));
    byId("status").textContent = `Ranked for ${history.length} ${history.length === 1 ? "title" : "titles"}.`;
    tell(null);
  } catch (error) {
    if (number !== asked) return;
    byId("status").textContent = "";
    tell(error);
  } finally {
    if (number === asked) rankings.forEach((list) => list.classList.remove("old"));
  }
}

function fill(list, titles, before) {
  list.replaceChildren(...titles.map((one, at) => {
    const item = element("li");
    item.append(element("span", String(at + 1), "place"), element("span", one.title, "title"));
    item.append(before ? moved(before.indexOf(one.title), at) : element("span"));
    item.append(element("span", one.score.toFixed(2), "score"));
    return item;
  }));
}

function moved(old, place) {
  if (old < 0) return element("span", "new", "moved new");
  if (old === place) return element("span", "", "moved");
  const up = old > place, made = element("span", `${up ? "↑" : "↓"} ${Math.abs(old - place)}`, `moved ${up ? "up" : "down"}`);
  made.setAttribute("aria-label", `${up ? "up" : "down"} ${Math.abs(old - place)}`);
  return made;
}

// The beginning.

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token = byId("token").value;
  byId("login").hidden = true;
  start();
});

async function start() {
  try {
    const about = await call("/stages");
    byId("about").textContent = `${about.name}: ${about.titles.toLocaleString("en")} titles, ${about.users.toLocaleString("en")} users`;
    selects.forEach((select) => select.replaceChildren(...about.stages.map((name) => new Option(name, name))));
    selects[0].value = about.stages[0];
    selects[1].value = about.stages[about.stages.length - 1];
    tell(null);
    search.focus();
  } catch (error) {
    tell(error);
  }
}
start();
