"use strict";
// Everything from a trajectory is put into the page as text, never as HTML.
const TRAJECTORIES = JSON.parse(document.getElementById("data").textContent);
const STEP_COLORS = ["#fbf3b4", "#a8ddb5", "#4eb3d3", "#2b7bba", "#253494"]; // first to last step
const CONFIDENCE_COLORS = ["#a6570b", "#dfc27d", "#f6e8c3", "#a9ded6", "#35978f"]; // 0 to 1
const PLAY_MS = 450;
const MOST_BARS = 120;
const SVG = "http://www.w3.org/2000/svg";

const state = { trajectory: 0, forward: 0, by: "step" };
let shown = null; // the trajectory on the page: tokens, elements, figures
let timer = null;

const at = (id) => document.getElementById(id);

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function drawn(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// A token's text with signs for what one would not see. Line breaks: "↵", and a break after it.
function visible(text) {
  if (text === "") return "∅";
  const signs = text
    .replace(/\n/g, "↵")
    .replace(/\t/g, "⇥")
    .replace(/[\u0000-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/[\u007f-\u00a0\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g,
      (c) => "U+" + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0"));
  return /^ +$/.test(signs) ? signs.replace(/ /g, "␣") : signs;
}

function mixed(colors, share) {
  const place = Math.min(Math.max(share, 0), 1) * (colors.length - 1);
  const low = Math.min(Math.floor(place), colors.length - 2);
  const channel = (color, i) => parseInt(color.slice(1 + 2 * i, 3 + 2 * i), 16);
  return [0, 1, 2].map((i) => Math.round(
    channel(colors[low], i) + (place - low) * (channel(colors[low + 1], i) - channel(colors[low], i))));
}

// Black or white, whichever contrasts more (WCAG's relative luminance).
function inkOn(rgb) {
  const [r, g, b] = rgb.map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

function paint(target, rgb) {
  target.style.background = rgb ? `rgb(${rgb.join(" ")})` : "";
  target.style.color = rgb ? inkOn(rgb) : "";
}

const stepColor = (step, most) => mixed(STEP_COLORS, most > 1 ? (step - 1) / (most - 1) : 0);

function colorOf(token) {
  if (state.by === "step") return stepColor(token.step, shown.mostSteps);
  return token.confidence === null ? null : mixed(CONFIDENCE_COLORS, token.confidence);
}

// Rounds that verified drafts, each with the forward that drafted first; none under other strategies.
function roundsOf(trajectory) {
  let before = 0;
  return (trajectory.rounds || []).map((round) => {
    const own = { ...round, begins: before + 1, refused: round.draft_ids.length - round.num_accepted };
    before = round.forward;
    return own;
  });
}

// What became of a token's draft.
function originOf(i, rounds) {
  const round = rounds.filter((r) => r.first <= i).pop();
  if (!round) return "";
  if (i - round.first < round.num_accepted) return ", draft accepted";
  return round.refused ? ", in place of a refused draft" : ", drawn without a draft";
}

// Response and tail as one list of tokens.
function tokensOf(trajectory, rounds) {
  const tokens = [];
  for (const part of ["response", "tail"]) {
    const columns = trajectory[part];
    columns.token_ids.forEach((id, i) => tokens.push({
      id, text: columns.texts[i], block: columns.block[i], step: columns.step[i],
      forward: columns.forward[i], confidence: columns.confidence ? columns.confidence[i] : null,
      isTail: part === "tail", origin: part === "tail" ? "" : originOf(i, rounds), isSpecial: trajectory.special_token_ids.includes(id),
    }));
  }
  return tokens;
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function open(number) {
  const { trajectory, response, finish_reason } = TRAJECTORIES[number];
  const rounds = roundsOf(trajectory);
  const tokens = tokensOf(trajectory, rounds);
  const forwards = trajectory.denoising_forwards;
  const stepsOf = new Map();
  for (const token of tokens) {
    stepsOf.set(token.block, Math.max(stepsOf.get(token.block) || 0, token.step));
  }
  shown = {
    tokens, rounds, forwards, stepsOf, mostSteps: Math.max(...stepsOf.values()),
    hasCanvas: trajectory.canvas_length !== null, spans: [], blocks: new Map(),
  };
  const confidences = tokens.filter((t) => !t.isTail && t.confidence !== null).map((t) => t.confidence);
  const length = trajectory.response.token_ids.length;
  const end = { eos: "end token", length: "length limit" }[finish_reason];
  figures([
    ["Tokens", length], ["Forwards", forwards],
    ["Tokens per forward", forwards ? (length / forwards).toFixed(2) : "–"],
    ["Blocks", stepsOf.size],
    ["Mean confidence", confidences.length ? mean(confidences).toFixed(3) : "–"],
    ["Ended by", end || finish_reason],
    ...(rounds.length ? [["Drafts accepted", acceptedOf(rounds)]] : []),
  ]);
  at("drafts").hidden = !rounds.length;
  at("key-refused").hidden = !rounds.length;
  at("prompt-text").textContent = trajectory.prompt.texts.join("");
  at("response").textContent = response;
  at("settings").textContent = Object.entries({ setting: trajectory.setting, seed: trajectory.seed, ...trajectory.settings })
    .map(([name, value]) => `${name}: ${value}`).join("\n");
  const place = at("tokens");
  place.replaceChildren();
  for (const token of tokens) {
    if (!shown.blocks.has(token.block)) {
      const block = element("span", "block");
      shown.blocks.set(token.block, block);
      place.append(block);
    }
    const span = element("span", "token", visible(token.text));
    span.title = about(token);
    span.addEventListener("mouseenter", () => { at("about").textContent = about(token); });
    shown.spans.push(span);
    shown.blocks.get(token.block).append(span);
    for (let i = token.text.split("\n").length; i > 1; i--) shown.blocks.get(token.block).append(element("br"));
  }
  at("forward").max = forwards;
  at("of-confidence").hidden = !confidences.length;
  drawBars(at("steps"), countsOf([...stepsOf.values()], 1, shown.mostSteps), { below: rounds.length ? "rounds of verification" : "steps", left: "blocks" });
  const bins = new Array(10).fill(0);
  for (const value of confidences) bins[Math.min(Math.floor(value * 10), 9)]++;
  drawBars(at("confidence"), bins.map((count, i) => ({ label: (i / 10).toFixed(1), count, color: mixed(CONFIDENCE_COLORS, (i + 0.5) / 10) })),
    { below: "probability of the token when it was settled", left: "tokens" });
}

function acceptedOf(rounds) {
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  return `${sum(rounds.map((r) => r.num_accepted))} of ${sum(rounds.map((r) => r.draft_ids.length))}`;
}

// Below the tokens: the drafts of the round that a forward belongs to, with what became of them.
function showDrafts(forward) {
  const round = shown.rounds.find((r) => r.begins <= forward && forward <= r.forward);
  const place = at("drafts");
  place.replaceChildren();
  if (!round) return;
  const isVerified = forward === round.forward;
  const says = !round.draft_ids.length ? "Nothing left to draft: one token is drawn"
    : isVerified ? `${round.draft_ids.length} drafted, ${round.num_accepted} accepted` +
      (!round.draws_next ? "" : round.refused ? ", 1 corrected" : ", 1 drawn after them")
    : `A draft of ${round.draft_ids.length}, verified by forward ${round.forward}`;
  place.append(element("span", "soft", says + (round.draft_ids.length ? ": " : "")));
  if (!isVerified) return;
  round.draft_texts.forEach((text, i) => {
    place.append(element("span", `token${i < round.num_accepted ? "" : " refused"}`, visible(text)));
  });
}

function about(token) {
  const known = token.confidence === null ? "" : `, confidence ${token.confidence.toFixed(3)}`;
  const end = token.isTail ? ", after the end of the response" : "";
  return `${JSON.stringify(token.text)} (id ${token.id}): block ${token.block + 1}, step ${token.step}, forward ${token.forward}${token.origin}${known}${end}`;
}

function figures(pairs) {
  at("figures").replaceChildren(...pairs.map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", "", name), element("dd", "", String(value)));
    return pair;
  }));
}

function countsOf(values, low, high) {
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) || 0) + 1);
  const bars = [];
  for (let value = low; value <= high; value++) {
    bars.push({ label: String(value), count: counts.get(value) || 0, color: stepColor(value, high) });
  }
  return bars;
}

// Bars with a label each, as far as there is room; `pick` makes them buttons.
function drawBars(svg, bars, { below, left, pick }) {
  const width = 330, height = 150, x0 = 34, y0 = 116, top = 8;
  const most = Math.max(1, ...bars.map((bar) => bar.count));
  const each = (width - x0) / bars.length;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("aria-label", bars.map((bar) => `${bar.label}: ${bar.count}`).join(", "));
  svg.replaceChildren(
    drawn("line", { class: "axis", x1: x0, x2: width, y1: y0, y2: y0 }),
    drawn("text", { class: "end", x: x0 - 6, y: top + 8 }, String(most)),
    drawn("text", { class: "end", x: x0 - 6, y: y0 }, "0"),
    drawn("text", { class: "middle", x: (x0 + width) / 2, y: height - 2 }, below),
    drawn("text", { class: "middle", x: 0, y: 0, transform: `translate(10 ${(y0 + top) / 2}) rotate(-90)` }, left),
  );
  const every = Math.ceil(bars.length / 11);
  return bars.map((bar, i) => {
    const size = (bar.count / most) * (y0 - top);
    const made = drawn("rect", {
      class: "bar", x: x0 + i * each + Math.min(each * 0.12, 2), y: y0 - size,
      width: Math.max(each - 2 * Math.min(each * 0.12, 2), 0.5), height: size,
    });
    if (bar.color) made.style.fill = `rgb(${bar.color.join(" ")})`;
    made.append(drawn("title", {}, `${bar.label}: ${bar.count}`));
    if (pick) {
      made.classList.add("pick");
      made.addEventListener("click", () => pick(i));
    }
    svg.append(made);
    if (i % every === 0) {
      svg.append(drawn("text", { class: "middle", x: x0 + (i + 0.5) * each, y: y0 + 14 }, bar.label));
    }
    return made;
  });
}

// Tokens of each forward; of many forwards, bars stand for several.
function drawSettled() {
  const each = Math.max(1, Math.ceil(shown.forwards / MOST_BARS));
  const bars = [];
  for (let low = 1; low <= shown.forwards; low += each) {
    const high = Math.min(low + each - 1, shown.forwards);
    bars.push({ label: String(low), high, count: 0 });
  }
  for (const token of shown.tokens) bars[Math.floor((token.forward - 1) / each)].count++;
  shown.bars = drawBars(at("settled"), bars, { below: "forward", left: "tokens", pick: (i) => go(bars[i].high) });
  shown.barEnds = bars.map((bar) => bar.high);
}

function drawScale() {
  const scale = at("scale"), swatches = element("span", "swatches");
  const add = (text, rgb) => {
    const swatch = element("span", "swatch", text);
    paint(swatch, rgb);
    swatches.append(swatch);
  };
  if (state.by === "step") {
    const most = shown.mostSteps;
    for (let step = 1; step <= most; step++) {
      if (most <= 12 || step === 1 || step === most || step % Math.ceil(most / 8) === 0) add(String(step), stepColor(step, most));
    }
    scale.replaceChildren(swatches, "step of its block");
  } else {
    for (const share of [0, 0.25, 0.5, 0.75, 1]) add(String(share), mixed(CONFIDENCE_COLORS, share));
    scale.replaceChildren(swatches, "probability when settled");
  }
}

function show() {
  const { tokens, spans, forwards } = shown;
  const forward = state.forward;
  const pending = tokens.filter((token) => token.forward > forward);
  const current = pending.length ? Math.min(...pending.map((token) => token.block)) : null;
  tokens.forEach((token, i) => {
    const isSettled = token.forward <= forward;
    const isLater = !isSettled && token.block !== current && !shown.hasCanvas;
    spans[i].className = ["token", token.isSpecial && "special", token.isTail && "tail",
      !isSettled && (isLater ? "later" : "mask"), token.forward === forward && "new"].filter(Boolean).join(" ");
    spans[i].title = isSettled ? about(token) : "MASK";
    paint(spans[i], isSettled ? colorOf(token) : null);
  });
  for (const [number, block] of shown.blocks) block.classList.toggle("current", number === current);
  shown.bars.forEach((bar, i) => {
    const low = i ? shown.barEnds[i - 1] : 0;
    bar.setAttribute("class", `bar pick ${forward > shown.barEnds[i] ? "past" : forward > low ? "now" : ""}`);
  });
  at("forward").value = forward;
  showDrafts(forward);
  const settled = tokens.length - pending.length, now = tokens.filter((token) => token.forward === forward);
  const step = now.length ? `, block ${now[0].block + 1}, step ${now[0].step}: ${now.length} token${now.length > 1 ? "s" : ""} settled` : "";
  at("where").textContent = `Forward ${forward} of ${forwards}${step} (${settled} of ${tokens.length} in all)`;
  const focus = spans[tokens.findIndex((token) => token.forward === forward)];
  if (focus && timer) focus.scrollIntoView({ block: "nearest" });
  history.replaceState(null, "", `#${state.trajectory + 1}/${forward}/${state.by}`);
}

function go(forward) {
  state.forward = Math.min(Math.max(forward, 0), shown.forwards);
  show();
}

function choose(number, forward) {
  state.trajectory = number;
  at("choice").value = number;
  open(number);
  drawSettled();
  drawScale();
  go(forward === undefined ? shown.forwards : forward);
}

function pause() {
  clearInterval(timer);
  timer = null;
  at("play").textContent = "▶ Play";
}

function play() {
  if (timer) return pause();
  if (state.forward >= shown.forwards) go(0);
  at("play").textContent = "⏸ Pause";
  timer = setInterval(() => {
    go(state.forward + 1);
    if (state.forward >= shown.forwards) pause();
  }, PLAY_MS);
}

const KEYS = {
  ArrowLeft: () => go(state.forward - 1), ArrowRight: () => go(state.forward + 1),
  Home: () => go(0), End: () => go(shown.forwards), " ": play,
};

function start() {
  TRAJECTORIES.forEach((entry, i) => {
    const option = element("option", "", `${i + 1}. ${entry.label}`);
    option.value = i;
    at("choice").append(option);
  });
  at("choice").addEventListener("change", (event) => { pause(); choose(Number(event.target.value)); });
  at("forward").addEventListener("input", (event) => { pause(); go(Number(event.target.value)); });
  at("first").addEventListener("click", () => go(0));
  at("back").addEventListener("click", () => go(state.forward - 1));
  at("next").addEventListener("click", () => go(state.forward + 1));
  at("last").addEventListener("click", () => go(shown.forwards));
  at("play").addEventListener("click", play);
  for (const input of document.getElementsByName("by")) {
    input.addEventListener("change", () => { state.by = input.value; drawScale(); show(); });
  }
  document.addEventListener("keydown", (event) => {
    const isTaken = event.ctrlKey || event.altKey || event.metaKey ||
      /^(SELECT|BUTTON|SUMMARY|TEXTAREA)$/.test(event.target.tagName) && event.key === " " ||
      event.target.tagName === "SELECT" || event.target.type === "radio" ||
      event.target.type === "range" && event.key !== " ";
    const action = KEYS[event.key];
    if (isTaken || !action) return;
    event.preventDefault();
    if (event.key !== " ") pause();
    action();
  });
  const [number, forward, by] = location.hash.slice(1).split("/");
  if (by === "confidence") {
    state.by = by;
    document.querySelector("input[value=confidence]").checked = true;
  }
  const wanted = TRAJECTORIES[Number(number) - 1] ? Number(number) - 1 : 0;
  choose(wanted, /^\d+$/.test(forward || "") ? Number(forward) : undefined);
}

start();
