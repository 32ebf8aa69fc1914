// Sort a table by the column whose head is pressed: one way, the other way, and as it was.
"use strict";
for (const table of document.querySelectorAll("table")) {
  const heads = [...[...table.tHead.rows].at(-1).cells];
  const bodies = [...table.tBodies].map((body) => [body, [...body.rows]]);
  for (const head of heads) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const at = head.cellIndex;
      const value = (row) => row.cells[at]?.dataset.value;
      const numeric = bodies.every(([, rows]) => rows.every((row) => !isNaN(value(row) ?? 0)));
      const first = numeric ? "descending" : "ascending"; // most figures are better the higher they are
      const second = numeric ? "ascending" : "descending";
      const way = { [first]: second }[head.getAttribute("aria-sort")];
      const next = head.hasAttribute("aria-sort") ? way : first;
      for (const other of heads) other.removeAttribute("aria-sort");
      if (next) head.setAttribute("aria-sort", next);
      const compare = (one, other) => {
        const [a, b] = [value(one), value(other)];
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined); // last either way
        const order = numeric ? a - b : a.localeCompare(b, "en", { numeric: true });
        return next === "ascending" ? order : -order;
      };
      for (const [body, rows] of bodies) {
        const fixed = (name) => rows.filter((row) => row.className === name);
        const moved = fixed("");
        if (next) moved.sort(compare);
        body.append(...fixed("heading"), ...moved, ...fixed("reference"));
      }
    });
  }
}
