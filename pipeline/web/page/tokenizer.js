// Prompts into token ids, as the package `tokenizers` does by a tokenizer.json of Unigram pieces: T5's and its kin.
// pipeline/web/tokenizer_rules.py refuses files that ask for more than is done here. npm's @huggingface/tokenizers 0.2.0
// takes a compatible form of Unicode for the table of characters, which gives other ids for letters that T5 does not know
// or writes in another way.

const WHITE = /\p{White_Space}+/u, MARK = "\u2581";
// Longer clusters of characters are normalized one by one (in bytes of UTF-8), as in the package.
const LONGEST_CLUSTER = 6;
// What an unknown character costs beyond the rarest piece.
const UNKNOWN_COST = 10;

/** A prompt as pipeline/generate/tokenizer.py's plain_caption has it: lower case, no blanks around it, as Python's. */
export const plainCaption = (text) =>
  text.toLowerCase().replace(/^[\p{White_Space}\x1c-\x1f]+|[\p{White_Space}\x1c-\x1f]+$/gu, "");

/** The normalizer "Precompiled": a table of sentencepiece, by a trie over bytes of UTF-8 (Darts' double array). */
class CharacterTable {
  constructor(base64) {
    const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    const view = new DataView(bytes.buffer), size = view.getUint32(0, true);
    this.units = Uint32Array.from({ length: size >> 2 }, (_, i) => view.getUint32(4 + 4 * i, true));
    this.texts = bytes.subarray(4 + size);
    this.encoder = new TextEncoder();
    this.decoder = new TextDecoder();
    this.clusters = new Intl.Segmenter("en", { granularity: "grapheme" });
  }

  /** What stands for the shortest beginning of a text that the table knows; null for none. */
  replaced(bytes) {
    const offset = (unit) => (unit >>> 10) << ((unit & 0x200) >>> 6);
    let place = offset(this.units[0]);
    for (const byte of bytes) {
      if (byte === 0) return null;
      place ^= byte;
      const unit = this.units[place];
      if (unit === undefined || (unit & 0x800000ff) >>> 0 !== byte) return null;
      place ^= offset(unit);
      if ((unit >>> 8) & 1) return this.text(this.units[place] & 0x7fffffff);
    }
    return null;
  }

  text(start) {
    const end = this.texts.indexOf(0, start);
    return this.decoder.decode(this.texts.subarray(start, end < 0 ? this.texts.length : end));
  }

  normalize(text) {
    const parts = [];
    for (const { segment } of this.clusters.segment(text)) {
      const bytes = this.encoder.encode(segment);
      const whole = bytes.length < LONGEST_CLUSTER ? this.replaced(bytes) : null;
      if (whole !== null) parts.push(whole);
      else for (const character of segment) parts.push(this.replaced(this.encoder.encode(character)) ?? character);
    }
    return parts.join("");
  }
}

/** Pieces of a Unigram model (Kudo, 2018): the likeliest way to write a word by them. */
class Unigram {
  constructor({ vocab, unk_id: unknown }) {
    this.unknown = unknown;
    this.scores = vocab.map(([, score]) => score);
    this.ids = new Map(vocab.map(([piece], id) => [piece, id]));
    this.longest = vocab.reduce((most, [piece]) => Math.max(most, [...piece].length), 1);
    this.unknownScore = this.scores.reduce((least, score) => Math.min(least, score), Infinity) - UNKNOWN_COST;
  }

  /** Ids of the pieces of a word; unknown characters side by side are one. */
  encode(word) {
    const characters = [...word], size = characters.length;
    const best = Array.from({ length: size + 1 }, () => ({ score: 0, start: -1, id: 0 }));
    const offer = (end, start, id, score) => {
      if (best[end].start < 0 || score > best[end].score) best[end] = { score, start, id };
    };
    for (let start = 0; start < size; start++) {
      const before = best[start].score;
      let piece = "", alone = false;
      for (let end = start + 1; end <= Math.min(size, start + this.longest); end++) {
        piece += characters[end - 1];
        const id = this.ids.get(piece);
        if (id === undefined) continue;
        alone ||= end === start + 1;
        offer(end, start, id, this.scores[id] + before);
      }
      if (!alone) offer(start + 1, start, this.unknown, this.unknownScore + before);
    }
    const ids = [];
    for (let end = size; end > 0; end = best[end].start) {
      const { id } = best[end];
      if (id !== this.unknown || ids.at(-1) !== this.unknown) ids.push(id);
    }
    return ids.reverse();
  }
}

/** Of a tokenizer.json; length: tokens of a prompt, with special ones and padding. */
export class Tokenizer {
  constructor(document, length) {
    this.length = length;
    this.padding = document.padding.pad_id;
    this.model = new Unigram(document.model);
    this.table = document.normalizer && new CharacterTable(document.normalizer.precompiled_charsmap);
    this.added = new Map(document.added_tokens.map(({ content, id }) => [content, id]));
    const escaped = [...this.added.keys()].sort((a, b) => b.length - a.length).map(escapedPattern);
    this.splitter = escaped.length ? new RegExp(`(${escaped.join("|")})`, "u") : null;
    const { single, special_tokens: special } = document.post_processor;
    const place = single.findIndex((row) => row.Sequence);
    const ids = (rows) => rows.flatMap((row) => special[row.SpecialToken.id].ids);
    this.first = ids(single.slice(0, place));
    this.last = ids(single.slice(place + 1));
  }

  /** All ids of a text, without special ones around them. */
  encode(text) {
    if (/\p{Surrogate}/u.test(text)) throw new Error("the prompt has half a character; write it again");
    const parts = this.splitter ? text.split(this.splitter) : [text];
    return parts.flatMap((part) => (this.added.has(part) ? [this.added.get(part)] : this.words(part)));
  }

  words(text) {
    const normal = this.table ? this.table.normalize(text) : text;
    return normal
      .split(WHITE)
      .filter((word) => word)
      .flatMap((word) => (word.startsWith(MARK) ? word : MARK + word).split(new RegExp(`(?=${MARK})`, "u")))
      .flatMap((word) => this.model.encode(word));
  }

  /** {ids, mask}: as many numbers as the length each; leftOut: how many tokens did not fit. */
  tokens(text) {
    const own = this.encode(text), room = this.length - this.first.length - this.last.length;
    const ids = [...this.first, ...own.slice(0, room), ...this.last];
    const padding = this.length - ids.length;
    return {
      ids: [...ids, ...Array(padding).fill(this.padding)],
      mask: [...ids.map(() => 1), ...Array(padding).fill(0)],
      leftOut: Math.max(0, own.length - room),
    };
  }
}

const escapedPattern = (text) => text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
