"use strict";
// Everything that comes is text: it is set by textContent, never as HTML.
const byId = (id) => document.getElementById(id);
const make = (name, text, kind) => {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  return element;
};
const known = (value) => value !== null && value !== undefined;
const number = (value, digits) => known(value) ? Number(value).toFixed(digits) : "–";
const counted = (value) => known(value) ? Number(value).toLocaleString("en") : "–";
const bytes = (value) => {
  if (!known(value)) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0, left = Number(value);
  while (left >= 1000 && at < units.length - 1) { left /= 1000; at += 1; }
  return `${at && left < 100 ? left.toPrecision(2) : Math.round(left)} ${units[at]}`;
};
const spell = (seconds) => {
  if (seconds < 120) return `${Math.round(seconds)} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
};
let skew = 0;
const ago = (moment) => known(moment)
  ? `${spell(Math.max(0, (Date.now() + skew - Date.parse(moment)) / 1000))} ago` : "–";
const clock = (moment) => new Date(moment).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
let latest = null;

function setText(element, text) { if (element.textContent !== text) element.textContent = text; }

function showStatus(status) {
  latest = status;
  skew = Date.parse(status.now) - Date.now();
  document.body.dataset.state = status.state;
  document.title = `${status.state} ${status.rounds_done}/${status.rounds} – ${status.run}`;
  setText(byId("run"), `${status.run}  ·  ${status.strategy}`);
  setText(byId("says"), status.says);
  // What is read aloud changes with what happens, not with every second.
  setText(byId("told"), status.says.replace(/,? since \d+ (s|min|h)|; it last wrote .* ago/g, ""));
  const bar = byId("bar");
  bar.setAttribute("aria-valuemax", status.rounds);
  bar.setAttribute("aria-valuenow", status.rounds_done);
  bar.firstElementChild.style.width = `${100 * status.rounds_done / Math.max(1, status.rounds)}%`;
  const facts = [["rounds", `${status.rounds_done} of ${status.rounds}`]];
  if (known(status.loss)) facts.push(["held-out loss", number(status.loss, 4)]);
  for (const [name, value] of Object.entries(status.metrics)) facts.push([name.replaceAll("_", " "), number(value, 4)]);
  if (known(status.round_seconds)) facts.push(["a round takes", spell(status.round_seconds)]);
  if (known(status.expected_end) && status.state === "running") facts.push(["expected end", clock(status.expected_end)]);
  if (known(status.deadline) && status.waiting_since) facts.push(["this wait ends", clock(status.deadline)]);
  if (status.lost_messages) facts.push(["lost messages", counted(status.lost_messages)]);
  byId("facts").replaceChildren(...facts.map(([name, value]) => {
    const fact = make("div");
    fact.append(make("dt", name), make("dd", value));
    return fact;
  }));
  showSites();
}

function showSites() {
  const rows = [];
  for (const site of latest.sites) {
    const row = make("tr"), name = make("th", site.name);
    name.scope = "row";
    const state = make("td"), mark = make("span", site.state, "mark");
    mark.dataset.state = site.state;
    state.append(mark);
    if (known(site.late_since)) state.append(` since ${ago(site.late_since).replace(" ago", "")}`);
    row.append(name, state, make("td", ago(site.last_seen)));
    const cells = [counted(site.rank), counted(site.examples), bytes(site.bytes_up), bytes(site.bytes_down),
      number(site.seconds, 1), known(site.change) ? Number(site.change).toPrecision(3) : "–",
      number(site.loss, 4), site.failures ? counted(site.failures) : "–"];
    row.append(...cells.map((text) => make("td", text, "number")));
    rows.push(row);
    if (known(site.words)) {
      row.className = "has-words";
      const words = make("tr", undefined, "words"), cell = make("td");
      cell.append(make("div", known(site.failed_round) ? `round ${site.failed_round}: ${site.words}` : site.words));
      cell.colSpan = 11;
      words.append(cell);
      rows.push(words);
    }
  }
  byId("sites").tBodies[0].replaceChildren(...rows);
}

function showRounds(rounds) {
  byId("rounds").tBodies[0].replaceChildren(...rounds.slice().reverse().map((round) => {
    const row = make("tr"), failed = make("td", round.failed.join(", ") || "–", "many");
    if (round.failed.length) failed.classList.add("failed-names");
    row.append(make("td", round.round === 0 ? "base" : String(round.round), "number"),
      make("td", round.clients.join(", ") || "–", "many"), failed,
      make("td", number(round.train_loss, 4), "number"), make("td", number(round.loss, 4), "number"),
      make("td", bytes(round.bytes_up), "number"), make("td", bytes(round.bytes_down), "number"),
      make("td", number(round.seconds, 1), "number"));
    return row;
  }));
  draw("loss", "Held-out loss", rounds.map((round) => [round.round, round.loss]), 4);
  const metric = rounds.flatMap((round) => Object.keys(round.metrics))[0];
  if (metric) draw("second", metric.replaceAll("_", " "), rounds.map((round) => [round.round, round.metrics[metric]]), 4);
  else draw("second", "Seconds a round", rounds.filter((round) => round.round > 0).map((round) => [round.round, round.seconds]), 1);
}

function draw(id, title, points, digits) {
  const caption = byId(`${id}-title`), place = byId(id);
  const seen = points.filter(([, y]) => known(y));
  caption.replaceChildren(title);
  if (!seen.length) { place.replaceChildren(make("p", "nothing yet")); return; }
  const last = seen[seen.length - 1];
  caption.append(make("b", number(last[1], digits)));
  const svg = (name, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const width = 480, height = 180, left = 52, bottom = 24, top = 10, right = 10;
  const xs = seen.map(([x]) => x), ys = seen.map(([, y]) => y);
  const x0 = Math.min(...xs), x1 = Math.max(...xs, x0 + 1);
  let y0 = Math.min(...ys), y1 = Math.max(...ys);
  if (y1 - y0 < 1e-9) { y0 -= Math.abs(y0) * 0.05 + 1e-3; y1 += Math.abs(y1) * 0.05 + 1e-3; }
  const at = ([x, y]) => [left + (x - x0) / (x1 - x0) * (width - left - right), top + (y1 - y) / (y1 - y0) * (height - top - bottom)];
  const image = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${title}: ${number(seen[0][1], digits)} in round ${seen[0][0]}, ${number(last[1], digits)} in round ${last[0]}` });
  for (const share of [0, 0.5, 1]) {
    const y = y0 + share * (y1 - y0), [, py] = at([x0, y]);
    image.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: py, y2: py }),
      svg("text", { x: left - 8, y: py + 4, "text-anchor": "end" }, y.toPrecision(3)));
  }
  for (const x of x1 - x0 > 1 ? [x0, Math.round((x0 + x1) / 2), x1] : [x0, x1]) {
    image.append(svg("text", { x: at([x, y0])[0], y: height - 6, "text-anchor": x === x1 ? "end" : "middle" }, String(x)));
  }
  image.append(svg("polyline", { class: "line", points: seen.map((point) => at(point).join(",")).join(" ") }));
  const [px, py] = at(last);
  image.append(svg("circle", { class: "dot", cx: px, cy: py, r: 3.5 }));
  place.replaceChildren(image);
}

const source = new EventSource("events");
source.addEventListener("status", (event) => { byId("link").hidden = true; showStatus(JSON.parse(event.data)); });
source.addEventListener("rounds", (event) => showRounds(JSON.parse(event.data)));
source.addEventListener("config", (event) => { byId("config").textContent = JSON.parse(event.data); });
source.onerror = () => {
  byId("link").hidden = false;
  setText(byId("link"), source.readyState === EventSource.CLOSED
    ? "This page is no longer served. Open the address that bouquet watch prints now; what stands here is old."
    : "This page has lost its connection and tries again. What it shows is old.");
};
setInterval(() => { if (latest) showSites(); }, 5000);
