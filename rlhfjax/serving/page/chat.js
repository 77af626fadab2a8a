// The page: draws the conversation, asks for answers, and hands votes on.

import { message, path, remove, root, until, visible } from "./tree.js";
import { answer, keep, models, settings, useToken } from "./server.js";

const of = (id) => document.getElementById(id);
const percent = (logprob) => `${Math.round(100 * Math.exp(logprob))} %`;
let talk = root();
let server = { feedback: false, consent: "" };
let writing = null; // what stops the answers that are being written

function element(tag, properties = {}, ...inside) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...inside);
  return made;
}

function button(text, label, action, pressed) {
  const made = element("button", { type: "button", textContent: text, title: label, onclick: action });
  made.setAttribute("aria-label", label);
  if (pressed !== undefined) made.setAttribute("aria-pressed", pressed);
  return made;
}

const say = (text) => { of("said").textContent = text; };

// Drawing -------------------------------------------------------------------------------------------------------------

function draw() {
  const rows = [];
  for (const node of path(talk)) {
    const beside = node.pair && !node.pair.chosen ? [node, node.pair.other].sort((a, b) => a.place - b.place) : [node];
    rows.push(element("div", { className: "row" }, ...beside.map(article)));
    if (beside.length > 1 && !writing) rows.push(ballot(beside));
  }
  of("talk").replaceChildren(...rows);
  of("stop").hidden = !writing;
  of("send").disabled = Boolean(writing);
}

function article(node) {
  const blind = node.pair && !node.pair.chosen;
  const name = node.role === "user" ? "You" : blind ? `Answer ${"AB"[node.place]}` : node.model;
  const words = element("div", { className: "words", dir: "auto" });
  fill(words, node);
  const made = element("article", { className: node.role }, element("h2", { textContent: name }), words);
  node.words = words;
  if (node.note) made.append(element("p", { className: "note", textContent: node.note }));
  if (!blind && !writing) made.append(tools(node));
  return made;
}

function fill(words, node) {
  if (!of("shares").checked || !node.tokens.length) {
    words.replaceChildren(visible(node.content));
    return;
  }
  words.replaceChildren(...node.tokens.map((token) => {
    const others = token.top_logprobs.map((one) => `${visible(one.token)} ${percent(one.logprob)}`).join(", ");
    const said = `${visible(token.token)}: ${percent(token.logprob)}. Likeliest: ${others}`;
    const span = element("span", { textContent: visible(token.token), tabIndex: 0, title: said });
    span.style.backgroundColor = `rgba(var(--sure), ${(0.45 * Math.exp(token.logprob)).toFixed(3)})`;
    span.onmouseenter = span.onfocus = () => say(said);
    return span;
  }));
}

function tools(node) {
  const bar = element("div", { className: "tools" });
  const siblings = node.parent.children, at = siblings.indexOf(node);
  if (siblings.length > 1) {
    const go = (step) => () => { node.parent.shown = at + step; draw(); };
    const before = button("‹", "Branch before", go(-1)), after = button("›", "Next branch", go(1));
    before.disabled = at === 0;
    after.disabled = at === siblings.length - 1;
    bar.append(before, `${at + 1} of ${siblings.length}`, after);
  }
  if (node.role === "user") bar.append(button("Edit", "Edit this message in a new branch", () => edit(node)));
  else bar.append(button("Again", "Another answer in a new branch", () => write(node.parent)), ...thumbs(node));
  return bar;
}

function thumbs(node) {
  if (!server.feedback || !node.content) return [];
  const vote = (label, name) => () => record(node, name, { completion: node.content, label, models: [node.model] });
  return [["Good", true, "Good answer"], ["Bad", false, "Bad answer"]].map(
    ([sign, label, name]) => button(sign, name, vote(label, name), String(node.vote === name)));
}

function ballot(pair) {
  const choose = (ranks) => async () => {
    const kept = pair[ranks[0] <= ranks[1] ? 0 : 1];
    const responses = pair.map((one) => one.content), by = pair.map((one) => one.model);
    if (server.feedback && !(await record(kept, "Compared", { responses, ranks, models: by }))) return;
    for (const one of pair) one.pair.chosen = true;
    kept.parent.shown = kept.parent.children.indexOf(kept);
    say(`A was ${by[0]}, B was ${by[1]}.`);
    draw();
  };
  return element("div", { className: "tools" }, button("A is better", "Answer A is better", choose([1, 2])),
    button("Equal", "Both are equal", choose([1, 1])), button("B is better", "Answer B is better", choose([2, 1])));
}

// Votes ---------------------------------------------------------------------------------------------------------------

async function record(node, vote, fields) {
  if (!of("agrees").checked) {
    say("Nothing is kept before you agree to the line at the bottom of the page.");
    of("agrees").focus();
    return false;
  }
  try {
    const messages = until(node.parent, of("system").value);
    const id = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
    await keep({ id, consent: true, messages, ...fields });
    node.vote = vote;
    say("Kept. Thank you.");
    draw();
    return true;
  } catch (error) {
    say(`Not kept: ${error.message}`);
    return false;
  }
}

// Asking --------------------------------------------------------------------------------------------------------------

function edit(node) {
  const field = element("textarea", { value: node.content, rows: 3 });
  field.setAttribute("aria-label", "The message anew");
  const done = () => { const made = message("user", field.value, node.parent); write(made); };
  node.words.replaceChildren(field, button("Send", "Send the message anew", done), button("Leave", "Leave it", draw));
  field.focus();
}

async function write(asked) {
  if (writing) return;
  const names = [of("model").value, of("other").value].filter(Boolean);
  if (Math.random() < 0.5) names.reverse(); // nobody knows who is A
  const nodes = names.map((name, place) => Object.assign(message("assistant", "", asked), { model: name, place }));
  if (nodes.length > 1) nodes.forEach((one, at) => { one.pair = { chosen: false, other: nodes[1 - at] }; });
  writing = new AbortController();
  say("");
  draw();
  const ended = await Promise.allSettled(nodes.map((node) => one(node, asked, writing.signal)));
  const failed = ended.find((result) => result.status === "rejected" && result.reason.name !== "AbortError");
  writing = null;
  for (const node of nodes) if (!node.content && !node.note) remove(node);
  if (nodes.some((node) => !node.content)) nodes.forEach((node) => { delete node.pair; });
  if (failed) fail(failed.reason);
  draw();
  of("text").focus();
}

async function one(node, asked, signal) {
  const number = (id) => (of(id).value === "" ? null : Number(of(id).value));
  const request = { model: node.model, messages: until(asked, of("system").value), logprobs: true, top_logprobs: 5,
    temperature: number("temperature"), top_p: number("top_p"), max_tokens: number("max_tokens"), drop_oldest: true };
  for await (const chunk of answer(request, signal)) {
    if (chunk.dropped) node.note = `The first ${chunk.dropped} messages no longer fit: the model did not read them.`;
    const [choice] = chunk.choices;
    if (!choice) continue;
    node.content += choice.delta.content || "";
    if (choice.logprobs) node.tokens.push(...choice.logprobs.content);
    if (choice.finish_reason === "content_filter") node.note = "The policy of this server stopped the message or the answer.";
    if (choice.finish_reason === "length") node.note = "The answer reached its longest length.";
    if (node.words?.isConnected) fill(node.words, node);
  }
}

function fail(error) {
  say(`error: ${error.message}`);
  if (error.status === 401) {
    of("token_line").hidden = false;
    of("settings").open = true;
    of("token").focus();
  }
}

// The beginning -------------------------------------------------------------------------------------------------------

of("ask").onsubmit = (event) => {
  event.preventDefault();
  const text = of("text").value;
  if (!text.trim() || writing) return;
  const open = path(talk).find((node) => node.pair && !node.pair.chosen);
  if (open) return say("Which answer is better? The conversation goes on from it.");
  of("text").value = "";
  write(message("user", text, path(talk).at(-1) || talk));
};
of("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    of("ask").requestSubmit();
  }
};
document.onkeydown = (event) => { if (event.key === "Escape") writing?.abort(); };
of("stop").onclick = () => writing?.abort();
of("shares").onchange = draw;
of("new").onclick = () => { writing?.abort(); talk = root(); say(""); draw(); of("text").focus(); };
of("token").onchange = () => { useToken(of("token").value); begin(); };

async function begin() {
  try {
    server = await settings();
    const names = (await models()).filter((one) => one.role === "policy").map((one) => one.id);
    of("model").replaceChildren(...names.map((name) => new Option(name)));
    of("other").replaceChildren(new Option("no other", ""), ...names.map((name) => new Option(name)));
    of("consent").hidden = !server.feedback;
    of("terms").textContent = server.consent;
    say(names.length ? "" : "This server has no policy to talk with.");
  } catch (error) {
    fail(error);
  }
}

begin();
draw();
of("text").focus();
