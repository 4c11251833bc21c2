// The page's behaviour: asks the service, streams the answer in, tells what the router makes of it. It knows the
// service's JSON and nothing of models.

import { html, number, svg } from "./elements.js";
import { draw } from "./map.js";

const $ = (id) => document.getElementById(id);
const TOKEN = "lora-lexicon-token";
// Conventions. Of 500 held-out prompts the router of the pack that ships is clear of 70 %, leaning in 20 % and 10 %
// are close calls; without their sentence 68, 52 and 33 % of these go to the same domain.
const SIMILARITIES = [[0.6, "high"], [0.3, "moderate"], [-Infinity, "low"]]; // from this cosine on
const LEADS = [[0.3, "clear"], [0.1, "leaning"], [-Infinity, "close call"]]; // from this lead over the next domain on
// One look for each domain, the same everywhere: eight colours (page.css) and eight outlines, which shift against
// each other after eight domains. Outlines live in a square from -1 to 1.
const OUTLINES = [
  "M1 0A1 1 0 1 1-1 0A1 1 0 1 1 1 0Z", "M0-1.1L1.1.9H-1.1Z", "M-.9-.9H.9V.9H-.9Z", "M0-1.25L1.1 0L0 1.25L-1.1 0Z",
  "M0 1.1L1.1-.9H-1.1Z", "M-.4-1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z", "M-1.1-1L0-.35L1.1-1V.35L0 1L-1.1.35Z",
  "M-.55-1H.55L1.1 0L.55 1H-.55L-1.1 0Z",
];
const BROKEN = "The answer broke off before its end. Please ask again.";

let world = { model: "", domains: [], map: null }; // what GET /domains says
let running = null; // the AbortController of the answer that is being written
let asked = null; // the query that the page shows
let placed = null; // where the router put a query: what POST /route said, and that query

// ---- marks and names

const word = (scale, value) => scale.find(([from]) => value >= from)[1];

function look(name) {
  const i = world.domains.findIndex((domain) => domain.name === name);
  return i < 0 ? null : { colour: `d${i % 8}`, outline: OUTLINES[(i + Math.floor(i / 8)) % 8] };
}

function marker(name, x, y, size, kind, ...children) {
  const { colour, outline } = look(name) ?? { colour: "", outline: OUTLINES[0] };
  const transform = `translate(${x.toFixed(1)} ${y.toFixed(1)}) scale(${size})`;
  return svg("path", { class: `${kind} ${colour}`, d: outline, transform, "data-domain": name }, ...children);
}

function symbol(name) {
  const outline = look(name) ? [marker(name, 0, 0, 5, "own")] : [];
  return svg("svg", { class: "symbol", viewBox: "-7 -7 14 14", "aria-hidden": "true" }, ...outline);
}

function domainLabel(name) {
  const words = { base: "the base, without an expert", mixed: "several experts, token by token" };
  return html("span", { class: "domain" }, ...(look(name) ? [symbol(name)] : []), words[name] ?? name);
}

// ---- talking to the service

class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function call(path, body, signal) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = { "Content-Type": "application/json", ...(token && { Authorization: `Bearer ${token}` }) };
  const request = { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) };
  const response = await fetch(path, request).catch((error) => {
    throw signal?.aborted ? error : new Refusal(0, "The service cannot be reached. Is it still running?");
  });
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  throw new Refusal(response.status, said?.error?.message ?? `The service answers with status ${response.status}.`);
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (text + value).split(/\r?\n\r?\n/);
    text = blocks.pop();
    for (const block of blocks) {
      const event = /^event: ?(.*)$/m.exec(block)?.[1].trim();
      const data = [...block.matchAll(/^data: ?(.*)$/gm)].map((line) => line[1]).join("\n");
      if (event && data) yield [event, JSON.parse(data)];
    }
  }
}

// ---- one question

// Runs a task that can be stopped, one at a time; the last one's words stand.
async function run(task) {
  running?.abort();
  const control = (running = new AbortController());
  excuse("");
  $("stop").hidden = false;
  try {
    say(await task(control.signal));
    return true;
  } catch (error) {
    if (running === control) explain(error);
    control.abort();
    return running !== control;
  } finally {
    if (running === control) rest();
  }
}

function rest() {
  running = null;
  $("definition").removeAttribute("aria-busy");
  if (document.activeElement === $("stop")) $("define").focus(); // focus is not lost with the button
  $("stop").hidden = true;
}

async function ask(query) {
  begin(query);
  const done = await run(async (signal) => {
    say("Writing…");
    await Promise.all([write(query, signal), route(query, signal)]);
    $("compare").hidden = world.domains.length < 2;
    return "Done.";
  });
  if (done) return;
  $("answer").hidden = !$("definition").textContent;
  if (placed?.query !== query) forget();
}

function begin(query) {
  asked = query;
  document.title = `${query.term} · lora-lexicon`;
  $("headword").textContent = query.term;
  $("sentence").textContent = query.context;
  for (const id of ["definition", "byline", "certainty", "warnings", "others"]) $(id).replaceChildren();
  $("definition").setAttribute("aria-busy", "true"); // a screen reader reads the whole, not each token
  $("compare").open = $("answer").hidden = false;
  $("compare").hidden = $("examples").hidden = true;
}

async function write(query, signal) {
  const output = $("definition");
  let ended = false;
  for await (const [event, data] of eventsOf(await call("define", { ...query, stream: true }, signal))) {
    signal.throwIfAborted();
    if (event === "error") throw new Refusal(0, data.error.message);
    if (event === "start") sign(query, data.domain);
    if (event === "token") output.append(data.text);
    if (event === "replace") output.textContent = data.text;
    if (event === "end") {
      ended = true;
      output.textContent = data.definition || "(the model wrote nothing)";
      sign(query, data.domain);
      $("warnings").replaceChildren(...(data.warnings ?? []).map((warning) => html("li", {}, warning)));
    }
  }
  if (!ended) throw new Refusal(0, BROKEN);
}

function sign(query, domain) {
  $("byline").replaceChildren("Written by ", domainLabel(domain), query.domain === "auto" ? "" : ", as you asked");
}

async function compare() {
  if (!$("compare").open || $("others").childElementCount) return;
  const done = await run(async (signal) => {
    say("Asking the other domains…");
    const response = await call("define", { ...asked, all_domains: true }, signal);
    const [{ definition, others }] = (await response.json()).definitions;
    signal.throwIfAborted();
    $("others").replaceChildren(...others.map((other) => card(other, definition)));
    return `${others.length} more answer${others.length === 1 ? "" : "s"}.`;
  });
  if (!done) $("compare").open = false;
}

function card(other, definition) {
  const same = other.definition === definition ? html("small", {}, "the same words") : "";
  return html("li", {}, domainLabel(other.domain), html("p", {}, other.definition || "(nothing)"), same);
}

// ---- the router's side

async function route(query, signal) {
  if (!world.model) await learn(signal); // asked before the page was ready
  if (!world.domains.length) return;
  try {
    const { term, context } = query;
    const found = await (await call("route", { term, context }, signal)).json();
    const same = found.domains.length === world.domains.length && found.domains.every(({ name }) => look(name));
    if (!same) await learn(signal); // a domain has joined or left
    signal.throwIfAborted();
    placed = { ...found, query };
    $("router").hidden = false;
    tellCertainty(found, query.domain === "auto" ? found.domain : query.domain);
    tellPlace(found);
    listSimilarities(found);
  } catch (error) {
    if (error.status !== 409) throw error;
    $("router").hidden = true; // a model without a router: there is nothing to be sure of
  }
}

function forget() {
  placed = null;
  $("similarities").hidden = true;
  $("map-words").replaceChildren();
  drawMap();
}

function drawMap() {
  if (world.map) draw($("plane"), world.map, placed, marker);
}

const byCosine = (router) => router === "centroid"; // else by a learned score, which has no bounds

function tellCertainty({ router, domain, margin, domains: [first, second] }, chosen) {
  const value = number(first.similarity);
  const measure = byCosine(router) ? `${word(SIMILARITIES, first.similarity)} similarity` : "score";
  const similarity = `${measure} (${value})`;
  const lead = margin === null || !second ? "" : `, ${number(margin)} ahead of ${second.name}`;
  const ahead = byCosine(router) ? word(LEADS, margin) : "the highest score";
  const words = domain === "base" ? "no domain is near enough" : lead ? ahead : "the only domain";
  const start = domain === "base" ? ["The router abstains: "]
    : domain === chosen ? ["The router’s choice: "] : ["The router would choose ", domainLabel(domain), ": "];
  const best = byCosine(router) ? "Nearest" : "Highest";
  const end = domain === "base" ? `. ${best} is ${first.name}${lead}, at ${similarity}.` : `${lead}; ${similarity}.`;
  $("certainty").replaceChildren(...start, html("strong", {}, words), end);
}

function tellPlace({ router, term, domains: [first], nearest }) {
  $("map").hidden = !world.map;
  drawMap();
  const items = nearest.map(({ term, domain, similarity }) =>
    html("li", {}, symbol(domain), `${term} `, html("small", {}, number(similarity)),
      html("span", { class: "unseen" }, ` (${domain})`)));
  const more = items.length ? " The nearest of the terms it knows them by:" : "";
  const where = byCosine(router) ? `To the router, “${term}” lies nearest to ${first.name}.`
    : `The router scores “${term}” highest for ${first.name}.`;
  $("map-words").replaceChildren(html("p", {}, where + more), html("ul", {}, ...items));
}

function listSimilarities({ router, domains }) {
  const cosine = byCosine(router);
  const most = cosine ? 1 : Math.max(...domains.map(({ similarity }) => Math.abs(similarity))) || 1;
  $("measure").textContent = cosine ? "Similarity" : "Score";
  $("measure-title").textContent = cosine ? "Similarity to the centre of each domain, from −1 to 1"
    : `Score of each domain, by a learned router (${router})`;
  $("cosine-words").hidden = !cosine;
  $("score-words").hidden = cosine;
  $("similarities").hidden = false;
  $("rows").replaceChildren(...domains.map(({ name, similarity, weight }) => {
    const long = similarity / most;
    const own = { class: look(name)?.colour ?? "", x: Math.min(0, long), width: Math.abs(long) };
    const box = { class: "bar", viewBox: "-1 0 2 1", preserveAspectRatio: "none", "aria-hidden": "true" };
    const bar = svg("svg", box, svg("rect", { ...own, y: 0.15, height: 0.7 }), svg("line", { y2: 1 }));
    return html("tr", {}, html("th", { scope: "row" }, domainLabel(name)), html("td", {}, bar),
      html("td", {}, number(similarity)), html("td", {}, number(weight)));
  }));
}

// ---- what is said, and the page's own state

const say = (text) => ($("status").textContent = text);

function excuse(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
  $("term").removeAttribute("aria-invalid");
}

function explain(error) {
  if (error.name === "AbortError") return say("Stopped.");
  say("");
  const token = error.status === 401;
  $("entrance").hidden = !token;
  const refused = sessionStorage.getItem(TOKEN) ? "This token is not accepted." : "This service asks for a token.";
  if (token) return excuse(refused);
  if (error instanceof Refusal) return excuse(error.message);
  console.error(error);
  return excuse(BROKEN);
}

function queryOf(form) {
  const { term, context, domain } = Object.fromEntries(new FormData(form));
  return { term: term.trim(), context: context.trim(), domain };
}

function submit(event) {
  event.preventDefault();
  const query = queryOf($("ask"));
  if (!query.term) {
    excuse("Please type a term first.");
    $("term").setAttribute("aria-invalid", "true");
    return $("term").focus();
  }
  const link = new URLSearchParams({ term: query.term });
  if (query.context) link.set("context", query.context);
  if (query.domain !== "auto") link.set("domain", query.domain);
  if (location.search !== `?${link}`) history.pushState(null, "", `?${link}`);
  return ask(query);
}

function fillIn() {
  const link = new URLSearchParams(location.search);
  $("term").value = link.get("term") ?? "";
  $("context").value = link.get("context") ?? "";
  $("author").value = link.get("domain") ?? "auto";
  if ($("author").selectedIndex < 0) $("author").value = "auto";
}

function followLink() {
  fillIn();
  if ($("term").value.trim()) return ask(queryOf($("ask")));
  running?.abort();
  rest();
  excuse("");
  say("");
  forget();
  document.title = "lora-lexicon";
  $("answer").hidden = true;
  $("examples").hidden = false;
}

async function learn(signal) {
  world = await (await call("domains", undefined, signal)).json();
  const names = world.domains.map(({ name }) => name);
  $("model").textContent = `Here: ${world.model}, ${names.length || "no"} domain${names.length === 1 ? "" : "s"}.`;
  const [chosen, auto] = [$("author").value, $("author").options[0]];
  const options = names.map((name) => html("option", { value: name }, name));
  $("author").replaceChildren(auto, ...options, html("option", { value: "base" }, "the base, without an expert"));
  $("author").value = [...names, "base"].includes(chosen) ? chosen : "auto";
  $("router").hidden = !world.map;
}

async function open() {
  try {
    await learn();
    $("entrance").hidden = true;
  } catch (error) {
    return explain(error);
  }
  drawMap();
  // What was typed or asked meanwhile stays.
  return location.search && !asked && followLink();
}

function scaleWords(scale) {
  return scale.map(([from, name], i) => {
    const bound = i < scale.length - 1 ? `${number(from)} and more` : `below ${number(scale[i - 1][0])}`;
    return html("li", {}, html("strong", {}, name), `: ${bound}`);
  });
}

$("similarity-words").append(...scaleWords(SIMILARITIES));
$("lead-words").append(...scaleWords(LEADS));
$("ask").addEventListener("submit", submit);
$("stop").addEventListener("click", () => running?.abort());
$("compare").addEventListener("toggle", compare);
$("context").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault(); // a sentence is one line
  $("ask").requestSubmit();
});
$("entrance").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, $("token").value);
  $("token").value = "";
  excuse("");
  asked = null; // what was refused is asked again
  open();
});
window.addEventListener("popstate", followLink);
window.addEventListener("resize", drawMap);
fillIn();
open();
