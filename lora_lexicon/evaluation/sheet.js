// One definition at a time; everything lies in `rows`, which is what the CSV holds.
"use strict";
const { rater, columns, criteria, rows } = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const store = `lora-lexicon-sheet ${rater} ${rows.map((row) => row.unit).sort()[0]} ${rows.length}`;
const kept = [...criteria.map((criterion) => criterion.name), "comment"];
let current = 0;

function recall() {
  try {
    const found = JSON.parse(localStorage.getItem(store)) ?? {};
    for (const row of rows) for (const name of kept) row[name] = String(found[row.unit]?.[name] ?? row[name]);
  } catch {
    at("status").textContent = "This browser keeps nothing: save before you close the page.";
  }
}

function keep() {
  const all = rows.map((row) => [row.unit, Object.fromEntries(kept.map((name) => [name, row[name]]))]);
  try {
    localStorage.setItem(store, JSON.stringify(Object.fromEntries(all)));
  } catch { /* said at the start */ }
  count();
}

const rated = (row) => criteria.every((criterion) => row[criterion.name]);

function count() {
  const done = rows.filter(rated).length;
  at("done").max = rows.length;
  at("done").value = done;
  at("count").textContent = `${done} of ${rows.length}`;
}

function show(number, focus = true) {
  current = Math.min(Math.max(number, 0), rows.length - 1);
  const row = rows[current];
  for (const name of ["term", "context", "reference", "definition"]) at(name).textContent = row[name] || "(none)";
  for (const criterion of criteria) {
    for (const input of document.getElementsByName(criterion.name)) input.checked = input.value === row[criterion.name];
  }
  at("comment").value = row.comment;
  at("before").disabled = current === 0;
  at("after").disabled = current === rows.length - 1;
  at("status").textContent = `Definition ${current + 1} of ${rows.length}`;
  if (focus) at("term").focus();
}

function build() {
  for (const criterion of criteria) {
    const field = document.createElement("fieldset");
    field.append(Object.assign(document.createElement("legend"), { textContent: criterion.title }));
    field.append(Object.assign(document.createElement("p"), { textContent: criterion.asks }));
    criterion.scale.forEach((meaning, i) => {
      const label = document.createElement("label");
      const input = Object.assign(document.createElement("input"), { type: "radio", name: criterion.name, value: String(i + 1) });
      label.append(input, ` ${i + 1} ${meaning}`);
      field.append(label);
    });
    at("criteria").append(field);
  }
}

function csv() {
  const cell = (text) => {
    const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text; // a spreadsheet would compute it
    return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  return "\ufeff" + [columns, ...rows.map((row) => columns.map((name) => row[name]))]
    .map((cells) => cells.map(cell).join(",") + "\r\n").join("");
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv()], { type: "text/csv;charset=utf-8" }));
  link.download = `${rater}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  const left = rows.filter((row) => !rated(row)).length;
  at("status").textContent = left ? `Saved; ${left} are not rated yet.` : "Saved; all are rated. Thank you.";
}

at("ratings").addEventListener("input", (event) => {
  const { name, value, id } = event.target;
  rows[current][id === "comment" ? "comment" : name] = value;
  keep();
});
at("ratings").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", (event) => {
  if (event.altKey && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
    event.preventDefault();
    show(current + (event.key === "ArrowRight" ? 1 : -1));
  }
  if (!/^[1-5]$/.test(event.key) || event.target.id === "comment" || event.altKey || event.ctrlKey || event.metaKey) return;
  const fields = [...document.querySelectorAll("fieldset")];
  const field = event.target.closest("fieldset") ?? fields.find((each) => !each.querySelector(":checked")) ?? fields[0];
  const input = field.querySelectorAll("input")[Number(event.key) - 1];
  input.checked = true;
  input.dispatchEvent(new Event("input", { bubbles: true }));
  const next = fields[fields.indexOf(field) + 1];
  (next ? next.querySelector(":checked") ?? next.querySelector("input") : at("after")).focus();
});
at("before").addEventListener("click", () => show(current - 1));
at("after").addEventListener("click", () => show(current + 1));
at("open").addEventListener("click", () => {
  const order = rows.map((_, i) => (current + 1 + i) % rows.length);
  show(order.find((i) => !rated(rows[i])) ?? current);
});
at("save").addEventListener("click", save);
build();
recall();
count();
show(Math.max(0, rows.findIndex((row) => !rated(row))), false);
