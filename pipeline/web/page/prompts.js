// Prompts of a model with a small vocabulary: "a COLOUR SHAPE [RELATION a COLOUR SHAPE] on BACKGROUND" into the numbers
// of its words, as pipeline/generate/scene_grammar.py does it.

const ARTICLES = ["a", "an", "the"], SYNONYMS = { grey: "gray" };
const EXCHANGED = { "right of": "left of", below: "above" };
const FIRST = ["colour", "shape"], SECOND = ["second colour", "second shape"];
const ALONE = "alone", NONE = "none";

/** The word of every slot. Throws an Error naming the first word that does not fit. */
export function parse(prompt, slots, grammar) {
  const known = Object.fromEntries(slots.map((slot) => [slot.name, slot.words]));
  const words = (prompt.toLowerCase().match(/[^\s,.]+/g) || [])
    .map((word) => (Object.hasOwn(SYNONYMS, word) ? SYNONYMS[word] : word))
    .filter((word) => !ARTICLES.includes(word));
  const refuse = (expectation) => {
    const here = words.length ? `found '${words[0]}'` : "found the end";
    throw new Error(`prompt '${prompt}': ${expectation}, ${here}; write "${grammar}"`);
  };
  const take = (expected, choices) => {
    for (const choice of choices) {
      const parts = choice.split(" ");
      if (parts.every((part, i) => words[i] === part)) {
        words.splice(0, parts.length);
        return choice;
      }
    }
    return refuse(`expected ${expected} (${choices.join(", ")})`);
  };
  const choices = (slot) => known[slot].filter((word) => word !== ALONE && word !== NONE);

  let chosen = { relation: ALONE, "second colour": NONE, "second shape": NONE };
  for (const slot of FIRST) chosen[slot] = take(`a ${slot}`, choices(slot));
  if (words[0] !== "on") {
    chosen.relation = take("a relation or 'on'", [...choices("relation"), ...Object.keys(EXCHANGED)]);
    for (const slot of SECOND) chosen[slot] = take(`a ${slot}`, choices(slot));
  }
  take("'on'", ["on"]);
  chosen.background = take("a background", choices("background"));
  if (words.length) refuse("expected the end");
  if (Object.hasOwn(EXCHANGED, chosen.relation)) {
    const swapped = { relation: EXCHANGED[chosen.relation] };
    FIRST.forEach((slot, i) => Object.assign(swapped, { [slot]: chosen[SECOND[i]], [SECOND[i]]: chosen[slot] }));
    chosen = { ...chosen, ...swapped };
  }
  return chosen;
}

/** The number of every slot's word: those of the first slot are counted from 1. */
export function tokenIds(prompt, slots, grammar) {
  const chosen = parse(prompt, slots, grammar);
  let first = 1;
  return slots.map(({ name, words }) => {
    const index = words.indexOf(chosen[name]);
    if (index < 0) throw new Error(`prompt '${prompt}': this model has no ${name} '${chosen[name]}'`);
    const id = first + index;
    first += words.length;
    return id;
  });
}
