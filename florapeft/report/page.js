"use strict";
// Tooltips: what the browser shows of a title after a while, at once and to the keyboard too.
const tip = document.getElementById("tip");
for (const element of document.querySelectorAll("[title]")) {
  element.dataset.tip = element.title;
  element.removeAttribute("title");
}
function show(element) {
  tip.textContent = element.dataset.tip;
  tip.hidden = false;
  const place = element.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const above = place.top - own.height - 8;
  tip.style.left = `${Math.max(8, Math.min(place.left, innerWidth - own.width - 8))}px`;
  tip.style.top = `${above > 8 ? above : place.bottom + 8}px`;
  element.setAttribute("aria-describedby", "tip");
}
function hide() {
  tip.hidden = true;
  document.querySelector("[aria-describedby=tip]")?.removeAttribute("aria-describedby");
}
for (const event of ["mouseover", "focusin"]) {
  document.addEventListener(event, ({ target }) => {
    const element = target.closest?.("[data-tip]");
    hide();
    if (element) show(element);
  });
}
document.addEventListener("focusout", hide);
document.addEventListener("scroll", hide, { passive: true });
document.addEventListener("keydown", ({ key }) => { if (key === "Escape") hide(); });

// Tables: a click on a column's name sorts by it, first from the largest number or the first letter.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const value = (row) => {
      const cell = row.cells[column];
      return "v" in cell.dataset ? Number(cell.dataset.v) : cell.textContent.trim();
    };
    const isText = head.classList.contains("text");
    const before = head.getAttribute("aria-sort");
    const direction = before ? (before === "ascending" ? -1 : 1) : isText || column === 0 ? 1 : -1;
    const order = (a, b) => isText ? a.localeCompare(b, "en", { numeric: true }) : a - b;
    body.append(...[...body.rows].sort((a, b) => direction * order(value(a), value(b))));
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
  }));
}

// Search: what does not match leaves the table and the list, and fades on the map.
const search = document.getElementById("search");
const rows = [...document.querySelectorAll("#layers tbody tr")];
search.addEventListener("input", () => {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = new Set();
  for (const row of rows) {
    const link = row.querySelector("a");
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    if (!row.hidden) found.add(link.hash);
  }
  for (const panel of document.querySelectorAll("#details > details")) panel.hidden = !found.has(`#${panel.id}`);
  for (const cell of document.querySelectorAll(".map a")) cell.classList.toggle("faded", !found.has(cell.hash));
  document.querySelector("output").textContent = words.length ? `${found.size} of ${rows.length}` : "";
});

// A link to a layer opens its panel.
function open() {
  const panel = location.hash && document.getElementById(location.hash.slice(1));
  if (panel instanceof HTMLDetailsElement) {
    panel.open = true;
    panel.scrollIntoView();
  }
}
addEventListener("hashchange", open);
open();
