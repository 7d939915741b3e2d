// The page over the API of `fedcanvas serve`: asks for pictures, shows them, and says what the model may know.
//
// Text of the API, prompts above all, becomes text of the page and never markup. Nothing is asked of any other host.
// Not here: what is drawn (server/generator.py), and whether a request is let in (server/serving/guard.py).

const MOST_OFFERS = 8;
const MOST_LOCAL_PROMPTS = 1000; // as many as one answer of the service has
const MOST_WORDS = 3; // that a large pool is searched for at a time
const PAUSE_MS = 150; // in typing, before it is
const MOST_SETS = 60; // of the gallery; the oldest go first
const EXAMPLES = 4;
const SLOW_MS = 1000; // after which drawing can be stopped
const MOST_SEED = 2n ** 63n - 1n;
const KEY = "fedcanvas-key";
const GALLERY = "fedcanvas-gallery";

const at = (id) => document.getElementById(id);
const prompt = at("prompt"), seed = at("seed"), variety = at("variety"), offers = at("offers"), grid = at("grid");
const changed = at("change");

let model = null; // what the service says of its model
let prompts = []; // those that are known here
let total = 0; // of prompts that the service has
// Drawn in this session, newest first: {asked, prompt, seed, truncation, trained, unknown, said, stages, before, model,
// pictures: [base64]}. `prompt` is what was drawn, `seed` its digits, `before` the set that it is a change of.
let sets = [];
let shown = null; // the one of them that is in the grid
let drawing = null; // AbortController of the request under way
let key = null; // of the API, where it asks for one

// ---- the API

class Refusal extends Error {
  constructor(status, message, { param = null, field = null } = {}) {
    super(message);
    Object.assign(this, { status, param: field ?? param });
  }
}

/** JSON text of `fields`, and of whole numbers as digits, which may have more of them than a number here can hold. */
function inJson(fields, numbers) {
  const digits = Object.entries(numbers).filter(([, value]) => value !== null).map(([name, value]) => `,"${name}":${value}`);
  return `${JSON.stringify(fields).slice(0, -1)}${digits.join("")}}`;
}

/** JSON of an answer. Throws a Refusal whose message says, for people, what happened and what to do. */
async function ask(path, { body, signal } = {}) {
  const headers = { accept: "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The service does not answer. See that it is running (fedcanvas serve), then try again.");
  }
  const found = await answer.json().catch(() => null);
  if (answer.ok && found) return found;
  const about = found?.error ?? {};
  throw new Refusal(answer.status, inWords(answer, about), about);
}

function inWords(answer, about) {
  const said = about.message ? sentence(about.message) : "";
  const wait = Number(answer.headers.get("retry-after")) || 5;
  switch (answer.status) {
    case 401: return "This key is not known to the service. See that it is whole, or ask whoever runs it for a new one.";
    case 429: return `Many people are drawing just now. Try again in ${counted(wait, "second")}.`;
    case 504: return "It took too long. Try again, or ask for fewer pictures.";
    case 503: return "The service has stopped drawing. Whoever runs it has to start it again.";
    case 500:
      return `The service made an error. If it happens again, tell whoever runs it this number: ${
        answer.headers.get("x-request-id") ?? "none"}.`;
    default: return said || `The service refused (${answer.status}). Load this page again, then try once more.`;
  }
}

// ---- words

const counted = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?)]$/.test(text) ? "" : ".");
const figure = (value) => Number(value).toLocaleString("en", { maximumSignificantDigits: 3 });

/** What odds of one to one become under a factor of e^epsilon, as a percentage: rounded up, and no plain 100. */
function mostSure(epsilon) {
  const missing = 100 / (1 + Math.exp(epsilon));
  const digits = Math.min(6, Math.max(0, Math.ceil(-Math.log10(missing))));
  // A blank that no line is broken at, before the sign.
  if (missing < 1e-6) return "practically 100\u00a0%";
  return `${(100 - Math.floor(missing * 10 ** digits) / 10 ** digits).toFixed(digits)}\u00a0%`;
}

function oneIn(chance) {
  return chance > 0 ? `1 in ${figure(1 / chance)}` : "0";
}

/** What epsilon promises, and what it does not, in sentences; the first is the verdict. */
function privacyInWords({ epsilon, delta, unit, verified, private: isPrivate, simulated, sites }) {
  const one = unit === "subject" ? "subject (all pictures of one person)" : "record (a picture with its captions)";
  if (isPrivate === false) {
    return ["It was trained without differential privacy: it may have learned any record by heart."];
  }
  if (epsilon === null || epsilon === undefined) {
    return ["How much it may know is not known: the model says no epsilon. Treat it as if it knew every record by heart."];
  }
  const verdict =
    epsilon <= 1 ? "Little: with or without any one of them, the model comes out much the same."
    : epsilon <= 3 ? "Something, but a proven limit leaves doubt about every one of them."
    : "Perhaps a lot: a limit is proven, but one this high rules out little by itself.";
  const words = [
    verdict,
    `If you think it a toss of a coin whether one ${one} was used in training, this model can make you at most`
      + ` ${mostSure(epsilon)} sure that it was`
      + (delta ? `, but for a chance of ${oneIn(delta)}.` : ".")
      + ` In other words, the odds change by a factor of about ${figure(Math.exp(Math.min(epsilon, 700)))} at most.`,
  ];
  if (epsilon > 3) {
    words.push("What attacks really reach may be much less. That is measured, not promised: this figure does not say it.");
  }
  if (sites !== 1) words.push("The figure is of one site. Whoever has records at several adds theirs up.");
  if (simulated) {
    words.push("This model comes from a simulation: its noise was made from a written seed, so the figure shows what a"
      + " real run would promise. It protects no real records.");
  }
  if (!verified) words.push("Nobody has signed for this figure: it is what the model says of itself.");
  return words;
}

// ---- small things of the page

function make(tag, about = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(about)) {
    if (name in made && typeof value !== "string") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function stored(name) {
  try { return sessionStorage.getItem(name); } catch { return null; }
}

/** Whether there was room; a browser may refuse any storage. */
function store(name, value) {
  try {
    if (value === null) sessionStorage.removeItem(name);
    else sessionStorage.setItem(name, value);
    return true;
  } catch { return false; }
}

function wrong(field, message) {
  const place = at(`${field.id}-error`);
  place.textContent = message;
  place.hidden = !message;
  if (message) field.setAttribute("aria-invalid", "true");
  else field.removeAttribute("aria-invalid");
}

function problem(message) {
  at("problem").textContent = message;
  at("problem").hidden = !message;
}

// ---- offers under the prompt

let active = -1, lastAsked = 0;

/** Prompts that hold every word typed, in any order; those that begin as typed come first. */
function matching(typed, among) {
  const folded = typed.trim().toLowerCase(), words = folded.split(/\s+/);
  const found = among.filter((text) => { const low = text.toLowerCase(); return words.every((word) => low.includes(word)); });
  const first = found.filter((text) => text.toLowerCase().startsWith(folded));
  return first.length === found.length ? found : [...first, ...found.filter((text) => !first.includes(text))];
}

/** Prompts of a pool that is too large to be here whole: those with all that was typed, and with its longest words. */
async function fromService(typed) {
  const longest = typed.split(/\s+/).sort((a, b) => b.length - a.length).slice(0, MOST_WORDS);
  const asked = [...new Set([typed, ...longest])].map(
    (text) => ask(`v1/prompts?limit=${MOST_LOCAL_PROMPTS}&contains=${encodeURIComponent(text)}`));
  const found = (await Promise.allSettled(asked)).flatMap((answer) => answer.value?.data ?? []);
  return [...new Set([...found, ...prompts])]; // what is known here is offered even where nothing was answered
}

async function offer() {
  const typed = prompt.value, number = ++lastAsked;
  let among = prompts;
  if (total > prompts.length) {
    await new Promise((done) => setTimeout(done, PAUSE_MS));
    if (number !== lastAsked) return; // typed on meanwhile
    among = await fromService(typed.trim());
    if (number !== lastAsked) return;
  }
  const exact = among.includes(typed.trim());
  const found = exact ? [] : matching(typed, among);
  showOffers(found.slice(0, MOST_OFFERS), found.length);
}

function showOffers(found, all = found.length) {
  active = -1;
  prompt.removeAttribute("aria-activedescendant");
  offers.replaceChildren(...found.map((text, i) => make("li", { id: `offer-${i}`, role: "option", "aria-selected": "false" }, text)));
  offers.hidden = found.length === 0;
  prompt.setAttribute("aria-expanded", String(found.length > 0));
  at("offers-said").textContent = found.length ? `${counted(found.length, "prompt")} of ${all.toLocaleString("en")} that fit.` : "";
}

function point(to) {
  const items = [...offers.children];
  active = (to + items.length) % items.length;
  items.forEach((item, i) => item.setAttribute("aria-selected", String(i === active)));
  prompt.setAttribute("aria-activedescendant", items[active].id);
}

function take(text) {
  prompt.value = text;
  lastAsked++;
  showOffers([]);
  wrong(prompt, "");
}

prompt.addEventListener("input", () => { wrong(prompt, ""); offer(); });
prompt.addEventListener("focus", () => prompt.select());
prompt.addEventListener("blur", () => { lastAsked++; showOffers([]); });
prompt.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  const open = !offers.hidden;
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    if (open) point(event.key === "ArrowDown" ? active + 1 : active < 0 ? offers.children.length - 1 : active - 1);
    else showOffers(prompts.slice(0, MOST_OFFERS), total);
  } else if (event.key === "Enter" && open && active >= 0) {
    event.preventDefault();
    take(offers.children[active].textContent);
  } else if (event.key === "Escape" && open) {
    event.preventDefault();
    showOffers([]);
  }
});
offers.addEventListener("mousedown", (event) => event.preventDefault()); // the field keeps the focus
offers.addEventListener("click", (event) => {
  const item = event.target.closest("li");
  if (item) take(item.textContent);
});

// ---- drawing

/** Its digits, `null` for a new one each time, or `undefined` where it is none. */
function checkedSeed() {
  const text = seed.value.trim();
  wrong(seed, "");
  if (text === "") return null;
  if (/^\d+$/.test(text) && BigInt(text) <= MOST_SEED) return String(BigInt(text));
  at("more").open = true;
  wrong(seed, `A seed is a whole number from 0 to ${MOST_SEED}, or nothing for new pictures each time.`);
  seed.focus();
  return undefined;
}

async function draw() {
  if (drawing) return;
  lastAsked++;
  showOffers([]);
  problem("");
  wrong(prompt, "");
  if (model === null) await begin(); // the first try failed: no key, or no service
  if (model === null) return;
  const text = prompt.value.trim(), chosen = checkedSeed();
  if (!text) {
    wrong(prompt, "Say what it shall draw, or choose one of the examples.");
    prompt.focus();
  }
  if (!text || chosen === undefined) return;
  const n = Number(document.querySelector('input[name="n"]:checked').value);
  const describe = at("describe").checked && !prompts.includes(text); // its own prompts are in its words
  await drawn({ prompt: text, n, truncation: Number(variety.value), describe }, { digits: chosen, field: prompt, again: draw });
}

/** Draws `text` as a change of `before`: as many pictures, and with its latents unless others are asked for. */
async function change(text, before, n) {
  if (drawing) return;
  problem("");
  wrong(changed, text ? "" : "Say what shall be different.");
  if (!text) { changed.focus(); return; }
  const fields = { prompt: text, n, truncation: before.truncation, describe: true, previous: [before.prompt] };
  if (await drawn(fields, { before, field: changed, again: () => change(text, before, n) })) {
    changed.value = "";
    take(shown.prompt);
  }
}

/** Asks for pictures and shows them; whether there are any. `field` is where `fields.prompt` was typed. */
async function drawn(fields, { digits = null, before = null, field, again }) {
  drawing = new AbortController();
  const slow = setTimeout(() => { at("stop").hidden = false; }, SLOW_MS);
  busy(fields.n, fields.prompt);
  try {
    const body = inJson({ ...fields, response_format: "b64_json" }, { seed: digits, previous_seed: before && before.seed });
    const { data, fedcanvas: about } = await ask("v1/images/generations", { body, signal: drawing.signal });
    const said = about.description;
    const made = {
      asked: fields.prompt, prompt: about.prompt, truncation: fields.truncation, trained: about.trained_on_prompt,
      // A seed that the service chose is short enough to be read exactly; others are known here.
      seed: digits ?? (before && said.keeps_latents ? before.seed : String(data[0].seed)),
      unknown: about.unknown_words, nothingKnown: Boolean(said?.keywords.length)
        && said.keywords.every((word) => about.unknown_words[word]?.length === 0),
      stages: said?.stages.map(({ name, made, note }) => ({ name, made, note })) ?? [],
      before: before && { prompt: before.prompt, seed: before.seed, truncation: before.truncation },
      model: about.model, pictures: data.map((picture) => picture.b64_json),
    };
    sets = [made, ...sets].slice(0, MOST_SETS);
    remember();
    show(made);
    gallery();
    grid.firstElementChild.scrollIntoView({ block: "nearest" }); // on a phone it lies below what was pressed
    return true;
  } catch (error) {
    failed(error, field, again);
    return false;
  } finally {
    clearTimeout(slow);
    at("stop").hidden = true;
    at("draw").removeAttribute("aria-disabled");
    grid.removeAttribute("aria-busy");
    drawing = null;
  }
}

function busy(n, text) {
  at("draw").setAttribute("aria-disabled", "true");
  grid.setAttribute("aria-busy", "true");
  placeholders(n);
  said("Drawing…", text);
  for (const id of ["keep", "smooth-choice", "made", "made-said"]) at(id).hidden = true;
}

function failed(error, field, again) {
  if (shown) show(shown);
  else { placeholders(4); said("Nothing was drawn", ""); }
  if (error.name === "AbortError") { problem("Stopped. Press Draw to try again."); return; }
  if (!(error instanceof Refusal)) { problem("This page made an error. Load it again, then try once more."); throw error; }
  if (error.status === 401) { askForKey(error.message, again); return; } // it was taken back meanwhile
  if (error.param === "prompt" || error.param === "seed") {
    const place = error.param === "seed" ? seed : field;
    wrong(place, error.message);
    place.focus();
    return;
  }
  problem(error.message);
}

function said(title, about) {
  at("shown-title").textContent = title;
  at("shown-about").textContent = about;
}

function placeholders(n) {
  grid.dataset.count = n;
  grid.replaceChildren(...Array.from({ length: n }, () => make("li", { class: "empty", "aria-hidden": "true" })));
}

const address = (base64) => `data:image/png;base64,${base64}`;
const alt = (set, i) => `${set.prompt}, seed ${set.seed}, picture ${i + 1} of ${set.pictures.length}`;
const fileName = (set, i) =>
  `${set.prompt.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "picture"}-${set.seed}-${i}.png`;

function show(set) {
  shown = set;
  const varied = set.truncation < 1 ? `, variety ${set.truncation}` : "";
  said(set.prompt, `${counted(set.pictures.length, "picture")}, seed ${set.seed}${varied}.`
    + (set.trained || set.stages.length ? "" : " The model was never trained on these words, so the pictures may not fit them."));
  showMade(set);
  grid.dataset.count = set.pictures.length;
  grid.replaceChildren(...set.pictures.map((picture, i) => make("li", {}, make("figure", {},
    make("img", { src: address(picture), alt: alt(set, i) }),
    make("figcaption", {}, make("a", {
      class: "small", href: address(picture), download: fileName(set, i), "aria-label": `Download picture ${i + 1}`,
    }, make("span", { "aria-hidden": "true" }, "↓"), "Download"))))));
  for (const id of ["keep", "smooth-choice", "change-form"]) at(id).hidden = false;
  kept();
  for (const button of at("gallery").querySelectorAll("button")) mark(button);
}

/** What was made of a person's words: in a sentence, word by word, and stage by stage. */
function showMade(set) {
  const words = Object.entries(set.unknown);
  const note = set.stages.at(-1)?.note ?? "";
  at("made-said").hidden = set.stages.length === 0;
  at("made-said").textContent = set.nothingKnown && !set.before
    ? `It knows none of the words of \u201c${set.asked}\u201d: this is its first sentence, and says nothing of what you asked.`
      + " Choose one of the examples, or their words."
    : `Made of \u201c${set.asked}\u201d${set.before ? ` and \u201c${set.before.prompt}\u201d` : ""}. ${sentence(note)}`;
  at("made").hidden = words.length === 0 && set.stages.length === 0;
  at("unknown").hidden = words.length === 0;
  at("unknown-words").replaceChildren(...words.map(([word, nearest]) => make("li", {}, make("span", { class: "word" }, word),
    ...(nearest.length ? ["nearest: "] : []),
    ...nearest.map((near) => {
      const chip = make("button", { type: "button", class: "chip", "aria-label": `Draw with ${near} in place of ${word}` }, near);
      chip.addEventListener("click", () => instead(set, word, near));
      return chip;
    }))));
  at("stages").hidden = set.stages.length === 0;
  at("stage-list").replaceChildren(...set.stages.map(({ name, made, note: about }) => make("li", {},
    make("span", { class: "word" }, `${name}: `), made || "nothing", make("small", {}, sentence(about)))));
}

/** Draws what was asked for with a word that the model knows; where that one was written otherwise, it is added. */
function instead(set, word, near) {
  if (drawing) return;
  const plain = word.replace(/[^\p{L}\p{N}]/gu, "\\$&");
  const whole = new RegExp(`(?<![\\p{L}\\p{N}])${plain}(?![\\p{L}\\p{N}])`, "iu");
  const text = whole.test(set.asked) ? set.asked.replace(whole, () => near) : `${set.asked}, ${near}`;
  if (set.before) {
    changed.focus({ preventScroll: true });
    change(text, set.before, set.pictures.length);
    return;
  }
  at("draw").focus({ preventScroll: true }); // what was pressed goes
  take(text);
  draw();
}

function kept() {
  at("keep").hidden = !shown || seed.value.trim() === String(shown.seed);
  at("seed-clear").hidden = seed.value === "";
}

at("form").addEventListener("submit", (event) => { event.preventDefault(); draw(); });
at("change-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (shown) change(changed.value.trim(), shown, shown.pictures.length);
});
changed.addEventListener("input", () => wrong(changed, ""));
at("stop").addEventListener("click", () => { drawing?.abort(); at("draw").focus(); });
at("keep").addEventListener("click", () => { seed.value = shown.seed; wrong(seed, ""); at("more").open = true; kept(); at("draw").focus(); });
at("seed-clear").addEventListener("click", () => { seed.value = ""; wrong(seed, ""); kept(); at("draw").focus(); });
seed.addEventListener("input", () => { wrong(seed, ""); kept(); });
at("smooth").addEventListener("change", (event) => document.body.classList.toggle("is-smooth", event.target.checked));

// ---- gallery of the session

function gallery() {
  at("session-empty").hidden = sets.length > 0;
  at("session-clear").hidden = sets.length === 0;
  at("gallery").replaceChildren(...sets.map((set) => {
    const thumbs = set.pictures.slice(0, 4).map((picture) => make("img", { src: address(picture), alt: "" }));
    const button = make("button", { type: "button", "aria-label": `Show again: ${set.prompt}, seed ${set.seed}` },
      make("div", { class: "thumbs", "data-count": String(thumbs.length) }, ...thumbs),
      make("div", { class: "name" }, set.prompt));
    button.of = set;
    mark(button);
    button.addEventListener("click", () => {
      if (drawing) return;
      problem("");
      take(set.prompt);
      show(set);
      at("said").scrollIntoView({ block: "nearest" });
    });
    return make("li", {}, button);
  }));
}

function mark(button) {
  if (button.of === shown) button.setAttribute("aria-current", "true");
  else button.removeAttribute("aria-current");
}

/** For a reload of the tab; where there is no room, as many of the newest as fit. */
function remember() {
  for (let most = sets.length; most > 0; most = Math.floor(most / 2)) {
    if (store(GALLERY, JSON.stringify(sets.slice(0, most)))) return;
  }
  store(GALLERY, null);
}

function recall() {
  try { sets = JSON.parse(stored(GALLERY) ?? "[]"); } catch { sets = []; }
  sets = sets.filter((set) => set.model === model.digest && set.unknown); // another model would draw others of the same seed
  gallery();
}

at("session-clear").addEventListener("click", () => {
  sets = [];
  store(GALLERY, null);
  gallery();
  at("draw").focus();
});

// ---- the card

function showCard() {
  const { card, line, ...about } = model;
  const privacy = card?.privacy ?? {};
  const simulated = card?.simulated ?? card?.entropy === "seeded";
  const sites = privacy.sites ? Object.keys(privacy.sites).length : null;
  const words = privacyInWords({ ...about, simulated, sites });
  const known = about.private !== false && about.epsilon !== null;
  const short = known ? `epsilon ${figure(about.epsilon)}` : about.private === false ? "no privacy" : "epsilon not known";
  at("card-title").textContent = `What this model may know about any one ${about.unit === "subject" ? "subject" : "record"}`;
  at("card-figure").textContent = short;
  at("card-figure-about").textContent = known ? "the smaller, the less it may know" : "";
  at("card-words").replaceChildren(...words.map((text, i) => make("p", i ? {} : { class: "verdict" }, text)));
  const rows = [
    ["Pictures", `${about.size} pixels`],
    ["Prompts it was trained on", about.prompts.toLocaleString("en")],
    ["Sites", sites && `${sites}${simulated ? ", simulated" : ""}`],
    ["Delta", about.delta && about.delta.toExponential(0)],
    ["Neighbours", about.adjacency && `${about.adjacency} one ${about.unit === "subject" ? "subject" : "record"}`],
    ["Evidence", line && sentence(line)],
    ["Digest", about.digest],
  ];
  at("card-details").replaceChildren(...rows.filter(([, value]) => value).flatMap(
    ([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  at("card-loading").hidden = true;
  at("card-body").hidden = false;
  at("epsilon-pill").textContent = `${short.charAt(0).toUpperCase()}${short.slice(1)}: what it may know`;
  at("epsilon-pill").hidden = false;
  if (about.warning) {
    at("warning").textContent = "This model is not verified: whatever it says of itself, its privacy included, may be false.";
    at("warning").hidden = false;
  }
}

// ---- examples

/** Spread over the pool by the golden ratio, so that a list made by a grammar shows its variety. */
function spread(pool, n) {
  const found = new Set();
  for (let i = 0; found.size < Math.min(n, pool.length); i++) found.add(pool[Math.floor(pool.length * ((i * 0.618034) % 1))]);
  return [...found];
}

function showExamples() {
  const chips = spread(prompts, EXAMPLES + 1).slice(prompts.length > EXAMPLES ? 1 : 0);
  const random = make("button", { type: "button", class: "chip random" }, "Surprise me");
  at("examples").replaceChildren(...chips.map((text) => make("button", { type: "button", class: "chip" }, text)), random);
}

at("examples").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button || drawing) return;
  take(button.classList.contains("random") ? prompts[Math.floor(Math.random() * prompts.length)] : button.textContent);
  draw();
});

// ---- keys

let afterKey = null;

function askForKey(message, then) {
  afterKey = then;
  wrong(at("key"), key === null ? "" : message);
  at("key").value = "";
  if (!at("key-dialog").open) at("key-dialog").showModal();
  at("key").focus();
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const typed = at("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(typed)) {
    wrong(at("key"), typed ? "A key has no spaces and only plain letters, figures and signs." : "Put the key in first.");
    return;
  }
  key = typed;
  store(KEY, key);
  at("key-dialog").close();
  afterKey?.();
});
at("key-cancel").addEventListener("click", () => at("key-dialog").close());
at("key-dialog").addEventListener("close", () => {
  if (model === null && key === null) problem("Nothing can be drawn without a key. Press Draw to give one.");
});

// ---- first visit

let beginning = null;

/** Once at a time: a key may be pressed before the service has answered. */
function begin() {
  beginning ??= load().finally(() => { beginning = null; });
  return beginning;
}

async function load() {
  try {
    const [about, pool] = await Promise.all([ask("v1/models"), ask(`v1/prompts?limit=${MOST_LOCAL_PROMPTS}`)]);
    model = about.data[0].fedcanvas;
    at("model-name").textContent = `/ ${about.data[0].id}`;
    ({ data: prompts, total } = pool);
  } catch (error) {
    if (error instanceof Refusal && error.status === 401) { askForKey(error.message, begin); return; }
    if (!(error instanceof Refusal)) throw error;
    at("card-loading").textContent = "The service has not said it.";
    problem(error.message);
    return;
  }
  problem("");
  if (!prompt.value) prompt.value = prompts[0] ?? "";
  showCard();
  showExamples();
  recall();
  if (document.activeElement === document.body) at("draw").focus({ preventScroll: true });
}

// A phone shows the pictures first; the summary that opens the choices is there only.
const narrow = matchMedia("(max-width: 36rem)");
const fold = () => { at("more").open = !narrow.matches; };
narrow.addEventListener("change", fold);
fold();

key = stored(KEY);
placeholders(4);
begin();
