/**
 * BERT's normaliser and WordPiece, as the tokenizers package has them, with the place of each token in its text.
 *
 * Places are UTF-16 code units, what JavaScript's strings are indexed by: a token's characters are
 * `text.slice(start, end)`. Python counts code points, and an emoji is one of these, but two code units.
 */

import { ValueError, shown } from "./errors.js";
import { CHINESE, MARK, NEWER, PUNCTUATION, REMOVED } from "./unicode.js";

/** What stands between blanks. */
const CHUNK = /[^\t\n\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/g;
const ASCII = /^[!-~]*$/;
const ANY_MARK = /^\p{M}$/u;

/**
 * A text's tokens, special ones aside, an entry a token.
 *
 * @typedef {object} Tokens
 * @property {number[]} ids what the model reads
 * @property {number[]} words the number of the word that a token is part of
 * @property {number[]} starts the token's characters are `text.slice(start, end)`
 * @property {number[]} ends
 */

/**
 * A character on its way to tokens, and where the text has it.
 *
 * @typedef {{character: string, start: number, end: number}} Character
 */

export class Tokenizer {
    /**
     * @param {object} content what stands in tokenizer.json
     * @throws {ValueError} it is no BERT's
     */
    constructor(content) {
        const { normalizer, pre_tokenizer: preTokenizer, model } = content;
        if (
            normalizer?.type !== "BertNormalizer" ||
            preTokenizer?.type !== "BertPreTokenizer" ||
            model?.type !== "WordPiece" ||
            !normalizer.clean_text ||
            !normalizer.handle_chinese_chars
        ) {
            const types = [normalizer, preTokenizer, model].map((part) => part?.type);
            throw new ValueError(
                `tokenizer.json is of ${shown(types)}, expected BertNormalizer, which cleans text and parts Chinese ` +
                    "characters, BertPreTokenizer and WordPiece",
            );
        }
        this.lowercase = normalizer.lowercase;
        this.stripsAccents = normalizer.strip_accents ?? normalizer.lowercase;
        this.vocabulary = new Map(Object.entries(model.vocab));
        this.prefix = model.continuing_subword_prefix;
        this.longestWord = model.max_input_chars_per_word;
        this.longestPiece = 0;
        for (const piece of this.vocabulary.keys()) this.longestPiece = Math.max(this.longestPiece, piece.length);
        this.added = new Map();
        for (const token of content.added_tokens) {
            if (token.normalized || token.single_word || token.lstrip || token.rstrip) {
                throw new ValueError(`added token ${shown(token)} of tokenizer.json, expected one that stands as it is`);
            }
            this.added.set(token.content, token.id);
        }
        const added = [...this.added.keys()].sort((one, other) => other.length - one.length);
        this.anyAdded = new RegExp(added.map((token) => token.replace(/[^\w\s]/g, "\\$&")).join("|") || "(?!)", "g");
        this.unknown = this.id(model.unk_token);
        this.first = this.id("[CLS]");
        this.separator = this.id("[SEP]");
    }

    /** The number of a token that the vocabulary must have. */
    id(token) {
        const id = this.added.get(token) ?? this.vocabulary.get(token);
        if (id === undefined) throw new ValueError(`tokenizer.json has no token ${shown(token)}`);
        return id;
    }

    /**
     * The tokens of a text, without those that stand around it.
     *
     * @param {string} text
     * @returns {Tokens}
     */
    tokens(text) {
        const tokens = { ids: [], words: [], starts: [], ends: [] };
        const known = new Map();
        let word = 0;
        for (const { start, end, id } of this.#parts(text)) {
            if (id !== undefined) {
                add(tokens, id, word++, start, end);
                continue;
            }
            for (const { 0: chunk, index } of text.slice(start, end).matchAll(CHUNK)) {
                for (const characters of words(this.#normalised(chunk, start + index))) {
                    const spelled = characters.map(({ character }) => character).join("");
                    if (!known.has(spelled)) known.set(spelled, this.#pieces(characters));
                    for (const { id, first, last } of known.get(spelled)) {
                        add(tokens, id, word, characters[first].start, characters[last].end);
                    }
                    word++;
                }
            }
        }
        return tokens;
    }

    /** Where the added tokens stand in a text, with their `id`, and what stands between them. */
    *#parts(text) {
        let start = 0;
        for (const { 0: token, index } of text.matchAll(this.anyAdded)) {
            yield { start, end: index };
            start = index + token.length;
            yield { start: index, end: start, id: this.added.get(token) };
        }
        yield { start, end: text.length };
    }

    /**
     * What is left of a text, and read.
     *
     * @param {string} text
     * @param {number} start where it stands
     * @returns {Character[]}
     */
    #normalised(text, start) {
        let characters = [];
        for (const character of text) {
            const end = start + character.length;
            if (CHINESE.test(character)) {
                for (const each of [" ", character, " "]) characters.push({ character: each, start, end });
            } else if (!REMOVED.test(character)) {
                characters.push({ character, start, end });
            }
            start = end;
        }
        if (this.stripsAccents && !ASCII.test(text)) {
            characters = decomposed(characters).filter(({ character }) => !MARK.test(character));
        }
        if (!this.lowercase) return characters;
        return characters.flatMap((each) =>
            Array.from(each.character.toLowerCase(), (character) => ({ ...each, character })),
        );
    }

    /**
     * The tokens of a word: at each place the longest that the vocabulary has.
     *
     * @param {Character[]} characters
     * @returns {{id: number, first: number, last: number}[]} with each one's first and last character
     */
    #pieces(characters) {
        const whole = [{ id: this.unknown, first: 0, last: characters.length - 1 }];
        if (characters.length > this.longestWord) return whole;
        const pieces = [];
        for (let first = 0; first < characters.length; first = pieces.at(-1).last + 1) {
            let last = Math.min(characters.length, first + this.longestPiece);
            let id;
            while (id === undefined && --last >= first) {
                const piece = characters.slice(first, last + 1).map(({ character }) => character);
                id = this.vocabulary.get((first ? this.prefix : "") + piece.join(""));
            }
            if (id === undefined) return whole;
            pieces.push({ id, first, last });
        }
        return pieces;
    }
}

function add(tokens, id, word, start, end) {
    tokens.ids.push(id);
    tokens.words.push(word);
    tokens.starts.push(start);
    tokens.ends.push(end);
}

/**
 * Characters without their accents, which follow them: Unicode's NFD.
 *
 * @param {Character[]} characters
 * @returns {Character[]} where a character became several, or several changed places, as the tokenizers package counts
 */
function decomposed(characters) {
    const parts = [];
    for (const { character } of characters) {
        const [first, ...others] = NEWER.test(character) ? [character] : character.normalize("NFD");
        insert(parts, { character: first, isAdded: false });
        for (const other of others) insert(parts, { character: other, isAdded: true });
    }
    let next = 0;
    return parts.map(({ character, isAdded }) => ({ ...characters[isAdded ? next - 1 : next++], character }));
}

/** Puts a part behind the others, but accents in their order: before those that NFD would have change places with it. */
function insert(parts, part) {
    let place = parts.length;
    while (place && changePlaces(parts[place - 1].character, part.character)) place--;
    parts.splice(place, 0, part);
}

/** Whether NFD has two characters change places. */
function changePlaces(one, other) {
    if (![one, other].every((each) => ANY_MARK.test(each) && !NEWER.test(each))) return false;
    return (one + other).normalize("NFD") !== one + other;
}

/**
 * The words among characters: what stands between blanks, and each punctuation mark.
 *
 * @param {Character[]} characters
 * @returns {Iterable<Character[]>}
 */
function* words(characters) {
    let word = [];
    for (const each of characters) {
        const isMark = PUNCTUATION.test(each.character);
        if (isMark || each.character === " ") {
            if (word.length) yield word;
            if (isMark) yield [each];
            word = [];
        } else {
            word.push(each);
        }
    }
    if (word.length) yield word;
}
