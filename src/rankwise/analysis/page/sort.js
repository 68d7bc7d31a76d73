"use strict";
// A heading of a sortable table is a button: it sorts the rows by its column, and back; what is missing stays last.
// The first column has names, all others numbers: what is none there ("-", "not possible") is missing.
const value = (row, at) => {
  const text = row.cells[at].textContent.trim();
  if (at === 0) return text;
  const number = parseFloat(text.replaceAll(",", ""));
  return Number.isNaN(number) ? undefined : number;
};
const before = (one, other) => (typeof one === "number" ? one - other : one.localeCompare(other));
for (const table of document.querySelectorAll(".sortable table")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, at) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      const known = rows.filter((row) => value(row, at) !== undefined);
      known.sort((one, other) => before(value(one, at), value(other, at)) * (falling ? -1 : 1));
      table.tBodies[0].append(...known, ...rows.filter((row) => value(row, at) === undefined));
    });
  });
}
