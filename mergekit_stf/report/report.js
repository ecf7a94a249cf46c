"use strict";
(() => {
  const table = document.getElementById("table");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows];
  const needle = document.getElementById("needle");
  const rule = document.getElementById("rule");
  const shown = document.getElementById("shown");

  const key = (row, column) => row.cells[column].dataset.key;
  const compare = {
    text: (a, b) => a.localeCompare(b, "en", { numeric: true }),
    number: (a, b) => Number(a) - Number(b),
  };

  function sort(column) {
    const head = heads[column];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const order = compare[head.dataset.kind];
    rows.sort((one, other) => {
      const a = key(one, column), b = key(other, column);
      if (a === "" || b === "") return (a === "") - (b === ""); // what a rule has not comes last
      return down ? order(b, a) : order(a, b);
    });
    body.append(...rows);
  }

  function filter() {
    const text = needle.value.trim().toLowerCase();
    let count = 0;
    for (const row of rows) {
      const fits = key(row, 0).toLowerCase().includes(text) &&
        (rule.value === "" || key(row, 1) === rule.value);
      row.hidden = !fits;
      count += fits;
    }
    shown.textContent = `${count} of ${rows.length} weights`;
  }

  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => sort(column));
  });
  needle.addEventListener("input", filter);
  rule.addEventListener("change", filter);
  needle.form.addEventListener("submit", (event) => event.preventDefault());
  filter();
})();
