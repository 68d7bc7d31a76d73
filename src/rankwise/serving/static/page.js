// The page: titles that were chosen, and what two stages recommend after them.
// Titles are data from anywhere: they are only ever set as text.

import { ask, keepToken, post } from "./server.js";
import { Picker } from "./picker.js";

const MOST = 200; // titles of a history, as the server has it
const SHOWN = 8; // titles of a search

const parts = Object.fromEntries([...document.querySelectorAll("[id]")].map((part) => [part.id, part]));
const chosen = [];
let request; // what can stop the one that is on its way

function make(kind, className, text) {
  const part = document.createElement(kind);
  part.className = className;
  part.textContent = text;
  return part;
}

function fail(error) {
  parts["token-form"].hidden = error.status !== 401;
  parts.problem.hidden = false;
  parts.problem.textContent = error.message;
  parts.status.textContent = "";
}

function clearProblem() {
  parts.problem.hidden = true;
  parts.problem.textContent = "";
}

// What was chosen

function choose(title) {
  if (chosen.length >= MOST) {
    fail(new Error(`At most ${MOST} titles can be chosen.`));
    return;
  }
  chosen.push(title);
  draw();
}

function remove(place) {
  chosen.splice(place, 1);
  draw();
  const next = parts.chosen.querySelectorAll("button")[Math.min(place, chosen.length - 1)];
  (next || parts.query).focus();
}

function chip(title, place) {
  const item = document.createElement("li");
  const button = make("button", "", "×");
  button.type = "button";
  button.setAttribute("aria-label", `Remove ${title}`);
  button.addEventListener("click", () => remove(place));
  item.append(make("span", "", title), button);
  return item;
}

function draw() {
  parts.chosen.replaceChildren(...chosen.map(chip));
  parts.chosen.hidden = parts.clear.hidden = !chosen.length;
  recommend();
}

// What is recommended

async function recommend() {
  request?.abort();
  clearProblem();
  parts.empty.hidden = chosen.length > 0;
  parts.results.hidden = !chosen.length;
  if (!chosen.length) {
    parts.status.textContent = "";
    parts["before-list"].replaceChildren();
    parts["after-list"].replaceChildren();
    return;
  }
  const own = (request = new AbortController());
  parts.results.setAttribute("aria-busy", "true");
  parts.status.textContent = "Looking through the catalogue…";
  try {
    const [before, after] = await both(own.signal);
    drawRanking(parts["before-list"], before, after, true);
    drawRanking(parts["after-list"], after, before);
    parts.status.textContent = summary(before, after);
  } catch (error) {
    if (error.name === "AbortError") return;
    parts.results.hidden = true;
    fail(error);
  } finally {
    if (own === request) parts.results.removeAttribute("aria-busy");
  }
}

function both(signal) {
  const asked = { history: chosen, top: Number(parts.top.value), exclude_seen: !parts.seen.checked };
  const of = async (stage) => (await post("recommend", { ...asked, stage }, signal)).recommendations;
  const first = of(parts.before.value);
  return Promise.all([first, parts.before.value === parts.after.value ? first : of(parts.after.value)]);
}

function summary(before, after) {
  const earlier = before.map((one) => one.title);
  const moved = after.filter((one, place) => earlier.includes(one.title) && earlier[place] !== one.title).length;
  const fresh = after.filter((one) => !earlier.includes(one.title)).length;
  return `${after.length} recommendations: ${moved} moved, ${fresh} new.`;
}

function drawRanking(list, ranking, other, first = false) {
  const places = new Map(other.map((one, place) => [one.title, place]));
  const most = Math.max(...ranking.map((one) => one.score));
  list.replaceChildren(
    ...ranking.map((one, place) => {
      const item = document.createElement("li");
      const bar = make("span", "bar", "");
      bar.style.width = `${100 * Math.exp(one.score - most)}%`;
      const share = make("span", "share", percent(Math.exp(one.score)));
      share.title = `log-probability ${one.score.toFixed(3)}`;
      item.append(make("span", "rank", String(place + 1)), make("span", "title", one.title));
      item.append(first ? left(places.has(one.title)) : move(places.get(one.title), place), share, bar);
      return item;
    }),
  );
}

function percent(share) {
  if (share < 0.00001) return "< 0.001 %";
  return `${(100 * share).toPrecision(2)} %`;
}

function marked(kind, sign, words) {
  const part = make("span", `move ${kind}`, "");
  const shown = make("span", "", sign);
  shown.setAttribute("aria-hidden", "true");
  part.append(shown, make("span", "hidden", words));
  part.title = words;
  return part;
}

function left(stays) {
  return stays ? make("span", "move", "") : marked("out", "out", "not among those on the right");
}

function move(earlier, now) {
  if (earlier === undefined) return marked("new", "new", "not among those on the left");
  if (earlier === now) return marked("same", "=", "the same place");
  const steps = Math.abs(earlier - now);
  const places = steps === 1 ? "1 place" : `${steps} places`;
  return earlier > now ? marked("up", `▲ ${steps}`, `up ${places}`) : marked("down", `▼ ${steps}`, `down ${places}`);
}

// The beginning

function fillStages({ run, stages, before, after }) {
  if (run) parts.run.textContent = `rankwise · ${run}`;
  for (const [id, selected] of Object.entries({ before, after })) {
    const options = stages.map(({ name }) => new Option(name, name, name === selected, name === selected));
    parts[id].replaceChildren(...options);
  }
}

function suggest(titles) {
  parts.popular.replaceChildren(
    ...titles.map((title) => {
      const button = make("button", "", title);
      button.type = "button";
      button.addEventListener("click", () => choose(title));
      return button;
    }),
  );
}

async function find(query, limit = SHOWN) {
  const words = new URLSearchParams({ q: query, limit });
  const { titles } = await ask(`titles?${words}`);
  return titles.map(({ title }) => title);
}

async function begin() {
  clearProblem();
  try {
    fillStages(await ask("stages"));
    suggest(await find("", 6));
    parts["token-form"].hidden = true;
  } catch (error) {
    fail(error);
  }
}

new Picker(parts.query, parts.options, find, choose, fail);
parts.query.addEventListener("keydown", (event) => {
  if (event.key === "Backspace" && !parts.query.value && chosen.length) {
    remove(chosen.length - 1);
    parts.query.focus();
  }
});
parts.clear.addEventListener("click", () => {
  chosen.length = 0;
  draw();
  parts.query.focus();
});
for (const id of ["top", "seen", "before", "after"]) parts[id].addEventListener("change", recommend);
parts["token-form"].addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken(parts.token.value);
  parts.token.value = "";
  begin();
});
begin();
