
"use strict";
const root = document.documentElement;
const make = (tag, props) => Object.assign(document.createElement(tag), props);

// Theme: the system's until somebody chooses; the choice is kept where the browser allows it.
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const themeButton = make("button", { type: "button", className: "theme" });
const isDark = () => (root.dataset.theme ?? (systemDark.matches ? "dark" : "light")) === "dark";
const showTheme = () => {
  themeButton.textContent = isDark() ? "Light" : "Dark";
  themeButton.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colors`);
};
try { const kept = localStorage.getItem("zsq-theme"); if (kept) root.dataset.theme = kept; } catch { /* not kept */ }
themeButton.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("zsq-theme", root.dataset.theme); } catch { /* not kept */ }
  showTheme();
});
systemDark.addEventListener("change", showTheme);
showTheme();
document.querySelector(".brand").append(themeButton);

// Tables: a button in every head sorts; long ones can be filtered by text and by kind.
const keyOf = (row, i) => {
  const cell = row.cells[i], value = cell.dataset.value ?? cell.textContent.trim();
  return value === "" ? null : isNaN(value) ? value : Number(value);
};
const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b
  : String(a).localeCompare(String(b), undefined, { numeric: true });
for (const box of document.querySelectorAll("[data-sortable]")) {
  const table = box.querySelector("table"), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const sort = (i, sign) => {
    for (const head of heads) head.removeAttribute("aria-sort");
    heads[i].setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const rows = [...body.rows].map((row) => [keyOf(row, i), row]);
    rows.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b));
    body.append(...rows.map(([, row]) => row));
  };
  heads.forEach((head, i) => {
    if ("fixed" in head.dataset) return;
    const button = make("button", { type: "button" });
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(i, head.getAttribute("aria-sort") === "ascending" ? -1 : 1));
  });
  if (body.rows.length < 8) continue;
  const bar = make("div", { className: "tools" });
  const filter = make("input", { type: "search", className: "filter", placeholder: "Filter by name, node or type" });
  filter.ariaLabel = "Filter rows";
  const count = make("span", { className: "soft count" });
  count.setAttribute("role", "status");
  let kind = "";
  const apply = () => {
    const text = filter.value.toLowerCase();
    let shown = 0;
    for (const row of body.rows) {
      row.hidden = !(row.textContent.toLowerCase().includes(text) && (!kind || row.dataset.kind === kind));
      shown += !row.hidden;
    }
    count.textContent = shown === body.rows.length ? "" : `${shown} of ${body.rows.length}`;
  };
  filter.addEventListener("input", apply);
  bar.append(filter);
  const kinds = [...new Set([...body.rows].map((row) => row.dataset.kind).filter(Boolean))];
  if (kinds.length > 1) {
    const group = make("div", { className: "kinds" });
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", "Kinds of tensors");
    for (const name of ["", ...kinds]) {
      const chip = make("button", { type: "button", textContent: { "": "all", bias: "biases" }[name] ?? `${name}s` });
      chip.setAttribute("aria-pressed", String(!name));
      chip.addEventListener("click", () => {
        kind = name;
        for (const other of group.children) other.setAttribute("aria-pressed", String(other === chip));
        apply();
      });
      group.append(chip);
    }
    bar.append(group);
  }
  if (box.classList.contains("cards")) {
    const select = make("select", { className: "order" });
    select.ariaLabel = "Sort rows";
    heads.forEach((head, i) => {
      if ("fixed" in head.dataset) return;
      for (const [sign, word] of [[1, "up"], [-1, "down"]]) {
        select.append(make("option", { value: `${i} ${sign}`, textContent: `${head.textContent}, ${word}` }));
      }
    });
    select.prepend(make("option", { value: "", textContent: "Sort by", disabled: true, selected: true }));
    select.addEventListener("change", () => sort(...select.value.split(" ").map(Number)));
    bar.append(select);
  }
  bar.append(count);
  box.before(bar);
}

// Commands can be copied.
for (const code of document.querySelectorAll("[data-copy]")) {
  const button = make("button", { type: "button", className: "copy", textContent: "Copy" });
  button.ariaLabel = `Copy ${code.textContent}`;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  code.after(button);
}

// Paper has nothing to click: everything is open while it is printed.
const closed = () => document.querySelectorAll("details:not([open])");
let opened = [];
addEventListener("beforeprint", () => { opened = [...closed()]; for (const one of opened) one.open = true; });
addEventListener("afterprint", () => { for (const one of opened) one.open = false; });
