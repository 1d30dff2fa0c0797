/**
 * Text in, spans out: the windows of a text, and the answers in what a model makes of them. reading_qualaminilm.py in
 * JavaScript, for one question at a time.
 */

import { ValueError, shown } from "./errors.js";
import { BLANK, ranked } from "./spans.js";

const ONLY_BLANKS = new RegExp(`^[${BLANK}]*$`);

/**
 * `start` and `end` are UTF-16 code units: `context.slice(start, end)` is `answer`.
 *
 * @typedef {{score: number, start: number, end: number, answer: string, answerable?: number}} Answer
 */

/**
 * Throws a {@link ValueError} that names an option which is none of the accepted values; `undefined` always is one.
 *
 * @param {object} options
 */
export function checkOptions(options) {
    const least = { top_k: 1, max_answer_len: 1, max_seq_len: 1, max_question_len: 1, doc_stride: 0 };
    for (const [name, most] of Object.entries(least)) {
        const value = options[name];
        if (value !== undefined && !(Number.isInteger(value) && value >= most)) {
            throw new ValueError(`${name} parameter should be an int >= ${most} (got ${shown(value)})`);
        }
    }
    const threshold = options.no_answer_threshold;
    if (threshold !== undefined && (typeof threshold !== "number" || Number.isNaN(threshold))) {
        throw new ValueError(`no_answer_threshold is ${shown(threshold)}, expected a number`);
    }
    for (const name of ["align_to_words", "handle_impossible_answer", "return_answerable"]) {
        const value = options[name];
        if (value !== undefined && typeof value !== "boolean") {
            throw new ValueError(`${name} is ${shown(value)}, expected true or false`);
        }
    }
}

/**
 * Throws a {@link ValueError} unless both are texts to be read.
 *
 * @param {{question: string, context: string}} example
 */
export function checkExample(example) {
    for (const name of ["question", "context"]) {
        const text = example?.[name];
        if (typeof text !== "string") throw new ValueError(`\`${name}\` is ${shown(text)}, expected a string`);
        if (!text) throw new ValueError(`\`${name}\` cannot be empty`);
        if (ONLY_BLANKS.test(text)) {
            const fault = name === "question" ? "is nothing but white space" : "holds no text";
            throw new ValueError(`\`${name}\` ${fault}: ${shown(text.slice(0, 50))}`);
        }
        if (/\p{Surrogate}/u.test(text)) throw new ValueError(`\`${name}\` is not valid Unicode text: half an UTF-16 pair`);
    }
}

/** Some of a context's tokens between the question's and the special ones. */
export class Window {
    /**
     * @param {import("./tokenizer.js").Tokens} tokens the context's
     * @param {number} start of the window's among them
     * @param {number} end
     * @param {number[]} idsBefore [CLS], the question's and [SEP]
     * @param {number} separator [SEP], which ends it
     * @param {number[]} questionIds the question's tokens that are words or pieces of such, each once
     */
    constructor(tokens, start, end, idsBefore, separator, questionIds) {
        Object.assign(this, { tokens, start, end, idsBefore, separator, questionIds });
        /** How many tokens it has, all counted. */
        this.length = idsBefore.length + end - start + 1;
    }

    /** @returns {{input_ids: number[], token_type_ids: number[], attention_mask: number[]}} an entry a token */
    modelInputs() {
        const ids = [...this.idsBefore, ...this.tokens.ids.slice(this.start, this.end), this.separator];
        return {
            input_ids: ids,
            token_type_ids: ids.map((_, i) => (i < this.idsBefore.length ? 0 : 1)),
            attention_mask: ids.map(() => 1),
        };
    }

    /**
     * What a model's logits say of [CLS] and of the context's tokens.
     *
     * @param {Float32Array} logits an entry a token of the window
     */
    scored(logits) {
        const scored = new Float32Array(1 + this.end - this.start);
        scored[0] = logits[0];
        scored.set(logits.subarray(this.idsBefore.length, this.length - 1), 1);
        return scored;
    }

    /**
     * Characters of the context from the window's context token `first` to its `last`.
     *
     * @param {number} first
     * @param {number} last
     * @param {boolean} alignToWords whether they are widened to whole words, which may reach out of the window
     * @returns {[number, number]} start and end
     */
    characters(first, last, alignToWords) {
        const { words, starts, ends } = this.tokens;
        [first, last] = [this.start + first, this.start + last];
        while (alignToWords && first > 0 && words[first - 1] === words[first]) first--;
        while (alignToWords && last < words.length - 1 && words[last + 1] === words[last]) last++;
        return [starts[first], ends[last]];
    }
}

/** Reads texts in windows, and answers out of them. */
export class Reading {
    /**
     * @param {import("./tokenizer.js").Tokenizer} tokenizer
     * @param {object} sizes
     * @param {number} sizes.maxSeqLen tokens of a window, where a call does not say
     * @param {number} sizes.positions tokens of the longest input that the model takes
     * @param {number} [sizes.noAnswerThreshold] as in config.json
     * @param {[number, number]} [sizes.answerableCalibration] as in config.json
     */
    constructor(tokenizer, { maxSeqLen, positions, noAnswerThreshold, answerableCalibration }) {
        Object.assign(this, { tokenizer, maxSeqLen, positions });
        this.noAnswerThreshold = noAnswerThreshold ?? 0;
        this.answerableCalibration = answerableCalibration ?? [1, 0];
    }

    /**
     * @param {string} text
     * @returns {import("./tokenizer.js").Tokens}
     * @throws {ValueError} it has none
     */
    tokens(text) {
        const tokens = this.tokenizer.tokens(text);
        if (!tokens.ids.length) throw new ValueError(`\`context\` holds no text: ${shown(text.slice(0, 50))}`);
        return tokens;
    }

    /**
     * The windows of a context, in its order.
     *
     * @param {string} question
     * @param {import("./tokenizer.js").Tokens} tokens the context's
     * @param {object} [options] doc_stride, max_question_len and max_seq_len, as of the pipeline
     * @returns {Window[]}
     * @throws {ValueError} the question leaves no room for the context, `doc_stride` is too large, or the model has too
     *     few positions
     */
    windows(question, tokens, options = {}) {
        const maxSeqLen = options.max_seq_len ?? this.maxSeqLen;
        const cut = this.#cut(question, options.max_question_len);
        const { ids: asked, starts, ends } = this.tokenizer.tokens(cut);
        const isWord = (id, i) =>
            id !== this.tokenizer.unknown && /[\p{L}\p{N}]/u.test(cut.slice(starts[i], ends[i]));
        const questionIds = [...new Set(asked.filter(isWord))].sort((one, other) => one - other);
        const { first: cls, separator } = this.tokenizer;
        const idsBefore = [cls, ...asked, separator];
        const n = tokens.ids.length;
        const room = maxSeqLen - idsBefore.length - 1;
        const stride = checkedStride(options.doc_stride, maxSeqLen, room, n, asked.length);
        const longest = Math.min(maxSeqLen, maxSeqLen - room + n);
        if (longest > this.positions) {
            throw new ValueError(
                `\`max_seq_len\` (${maxSeqLen}) allows an input ${longest} tokens long, the model has positions for ` +
                    this.positions,
            );
        }
        const windows = [];
        for (let start = 0; start < Math.max(1, n - stride); start += room - stride) {
            windows.push(new Window(tokens, start, Math.min(start + room, n), idsBefore, separator, questionIds));
        }
        return windows;
    }

    #cut(question, maxQuestionLen) {
        if (maxQuestionLen === undefined) return question;
        const { ends } = this.tokenizer.tokens(question);
        return ends.length > maxQuestionLen ? question.slice(0, ends[maxQuestionLen - 1]) : question;
    }

    /**
     * The best answers over all windows of one text: see `Reading.best` of reading_qualaminilm.py.
     *
     * @param {string} context
     * @param {Window[]} windows
     * @param {Float32Array[][]} logits of starts and of ends a window, what `Window.scored` gives
     * @param {object} [options] top_k, max_answer_len, align_to_words, handle_impossible_answer, no_answer_threshold and
     *     return_answerable, as of the pipeline
     * @returns {Answer | Answer[]} one, or where `top_k` is above 1 an array of at most as many
     * @throws {ValueError} logits that are not finite
     */
    best(context, windows, logits, options = {}) {
        const { top_k: topK = 1, max_answer_len: maxAnswerLen = 15, align_to_words: alignToWords = true } = options;
        let answers = [];
        let first;
        const seen = new Set();
        for (const text of ranked(context, windows, logits, maxAnswerLen, alignToWords)) {
            first ??= text;
            const { logScore, start, end } = text;
            const answer = context.slice(start, end);
            if (seen.has(answer.toLowerCase())) continue;
            seen.add(answer.toLowerCase());
            answers.push({ score: Math.exp(Math.min(0, logScore)), start, end, answer });
            if (answers.length === topK) break;
        }
        if (options.handle_impossible_answer) {
            const threshold = options.no_answer_threshold ?? this.noAnswerThreshold;
            const none = { score: Math.exp(Math.min(0, threshold + first.logNull)), start: 0, end: 0, answer: "" };
            // It stands last where it does not win; the one answer that was asked for stays.
            answers.splice(first.logEvidence < threshold ? 0 : Math.max(1, topK - 1), 0, none);
            answers = answers.slice(0, topK);
        }
        if (options.return_answerable) {
            const [slope, intercept] = this.answerableCalibration;
            const answerable = (1 + Math.tanh((slope * first.logEvidence + intercept) / 2)) / 2; // the logistic function
            answers = answers.map((answer) => ({ ...answer, answerable }));
        }
        return topK > 1 ? answers : answers[0];
    }
}

/** Tokens that neighbouring windows share, if `room` of a context's tokens fit in each. */
function checkedStride(docStride, maxSeqLen, room, contextLength, questionLength) {
    const stride = docStride ?? Math.min(Math.floor(maxSeqLen / 2), 128);
    if (stride > maxSeqLen) {
        throw new ValueError(`\`doc_stride\` (${stride}) is larger than \`max_seq_len\` (${maxSeqLen})`);
    }
    if (room < 1) {
        throw new ValueError(
            `\`question\` is ${questionLength} tokens long, which leaves no room for the context in \`max_seq_len\` ` +
                `(${maxSeqLen})`,
        );
    }
    if (stride < room) return stride;
    if (docStride === undefined) return Math.floor(room / 2);
    if (contextLength <= room) return 0;
    throw new ValueError(
        `\`doc_stride\` (${stride}) is not smaller than the ${room} tokens of context that fit in \`max_seq_len\` ` +
            `(${maxSeqLen}) beside the question`,
    );
}
