/** Which spans of a text answer, how surely, and where they end: spans_qualaminilm.py in JavaScript. */

import { ValueError } from "./errors.js";

/** Among this many best spans of a window the scores of spans of one text are merged. */
const MERGED_SPANS = { true: 12, false: 1 }; // by align_to_words
// Python's \s, \w and [^\W_], which are not JavaScript's.
export const BLANK = "\\t-\\r\\x1c- \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const LETTER = "[\\p{L}\\p{N}]";
const WORD = "[\\p{L}\\p{N}_]";
/** What no run holds: see `RUN` of spans_qualaminilm.py. Surrogates, and with them all that are pairs, are none's. */
const APART = new RegExp(
    `[${BLANK}"<>\\[\\]{}|;\`\\u0e00-\\u1dff\\u2000-\\u20ab\\u20ad-\\u2211\\u2213-\\uffff]`,
);
const PARTING = /(?<![0-9]),|,(?![0-9])|(?<=[\p{L}\p{Nl}\p{No}]):(?=[\p{L}\p{Nl}\p{No}])/gu;
const LONGEST_RUN = 1000; // characters
const NAME = /^__[a-z]/; // of Python's own
const STRING = new RegExp(
    `@|://|${LETTER}_+${LETTER}|${NAME.source}|\\._` +
        `|${LETTER}[#$%&*^~]${LETTER}` +
        `|${LETTER}\\+[0-9]` +
        `|[0-9]\\.[0-9]|${LETTER}\\.[a-z]|[A-Z]\\.[A-Z](?![a-z])` +
        "|[0-9]/[0-9]|[A-Z]/[A-Z](?![a-z])|/.*/|^[.~]*/" +
        "|^[-+\\u2212\\u00b1]\\.?[0-9]" +
        `|^(?=.*[0-9]).*${LETTER}!${LETTER}`,
    "u",
);
const ACCENT = /^\p{Mn}/u;
const SCHEME = /[a-zA-Z][a-zA-Z0-9+.-]*$/; // of an address, before its ://
const COUNTRY = /^[A-Z]{1,3}(?=[$\u00a3\u20ac][0-9])/; // the US of `US$5`
/** A line that begins so is `field: value`. */
const FIELD = new RegExp(`^(?<before>(?:(?!${WORD})[^\\n])*)${WORD}[^:\\n]{0,39}:[ \\t]+[^${BLANK}]`, "u");
const WRAPPED = 50; // characters, from which on a line may be one of several that are one paragraph
const BLANKS_BEFORE = new RegExp(`^[${BLANK}]*`);
const BLANKS_AFTER = new RegExp(`[${BLANK}]*$`);

/**
 * The answers of all windows of one text, best first; they may repeat, from the second time on with less.
 *
 * @param {string} context
 * @param {import("./reading.js").Window[]} windows
 * @param {Float32Array[][]} logits of each window
 * @param {number} maxAnswerLen
 * @param {boolean} alignToWords
 * @returns {Iterable<{logEvidence: number, logScore: number, logNull: number, start: number, end: number}>} `logNull` is
 *     what `logScore` would be if the evidence were 1
 * @throws {ValueError} logits that are not finite
 */
export function ranked(context, windows, logits, maxAnswerLen, alignToWords) {
    const spans = windows.map((each, i) => new WindowSpans(context, each, logits[i], maxAnswerLen, alignToWords));
    const { logShares, logNulls } = shares(
        spans.map((each) => each.evidenceOfAll),
        weightsOf(windows),
    );
    function* ofWindow(i) {
        for (const each of spans[i].ranked()) {
            yield { ...each, logScore: each.logProbability + logShares[i], logNull: logNulls[i] };
        }
    }
    return merged(spans.map((_, i) => ofWindow(i)));
}

/** How much the words of the question speak for each window: see `weights_of` of spans_qualaminilm.py. */
function weightsOf(windows) {
    const weights = windows.map(() => 0);
    const ids = windows.map(({ tokens, start, end }) => new Set(tokens.ids.slice(start, end)));
    for (const word of windows[0].questionIds) {
        const stands = ids.map((each) => each.has(word));
        const found = stands.filter(Boolean).length;
        for (const [i, here] of stands.entries()) if (here) weights[i] += Math.log((ids.length + 1) / (found + 0.5));
    }
    const most = weights.reduce((one, other) => Math.max(one, other));
    return weights.map((each) => each - most);
}

/** What all of the iterables of ranked answers hold, best first. */
function* merged(iterables) {
    const rest = iterables.map((each) => each[Symbol.iterator]());
    const heads = rest.map((each) => each.next().value);
    for (;;) {
        let number = -1;
        for (const [i, head] of heads.entries()) {
            if (head && !(heads[number]?.logScore >= head.logScore)) number = i;
        }
        if (number < 0) return;
        yield heads[number];
        heads[number] = rest[number].next().value;
    }
}

/**
 * What a window's probabilities count in the whole text: with those of the other windows, and 1/Z that there is no answer,
 * they make one.
 *
 * @param {number[]} evidence the logarithm of each window's 1/null, 0 or more
 * @param {number[]} weights the logarithm of what each window's evidence is multiplied by, the greatest 0
 * @returns {{logShares: number[], logNulls: number[]}} the logarithm of (weight/null)/Z a window, with Z = 1 + the sum
 *     over windows of weight (1/null - 1); and that of weight/Z, what evidence of 1 counts in the window
 */
function shares(evidence, weights) {
    const ofAll = evidence.map((each, i) => each + weights[i]);
    const most = ofAll.reduce((one, other) => Math.max(one, other));
    // Z without its factor exp(most): of all that is raised, nothing is above 0.
    let rest = Math.exp(-most);
    for (const [i, each] of ofAll.entries()) rest += Math.exp(each - most) * -Math.expm1(-evidence[i]);
    rest = Math.log(rest);
    return { logShares: ofAll.map((each) => each - most - rest), logNulls: weights.map((each) => each - most - rest) };
}

/** The answer spans of one window, over its context tokens, and against its null, [CLS]. */
class WindowSpans {
    /**
     * @param {string} context
     * @param {import("./reading.js").Window} window
     * @param {Float32Array[]} logits of starts and of ends, of [CLS] and the window's context tokens
     * @param {number} maxAnswerLen
     * @param {boolean} alignToWords
     * @throws {ValueError} logits that are not finite
     */
    constructor(context, window, logits, maxAnswerLen, alignToWords) {
        if (!logits.every((each) => each.every(Number.isFinite))) {
            throw new ValueError("the model's logits are not finite: are its weights damaged?");
        }
        Object.assign(this, { context, window, alignToWords });
        /** The logarithm of 1/null, that of the sum of all evidence where the null's own is 1. */
        this.evidenceOfAll = 0;
        [this.starts, this.ends] = logits.map((each) => {
            const most = each.reduce((one, other) => Math.max(one, other));
            const sum = Math.log(each.reduce((total, logit) => total + Math.exp(logit - most), 0));
            this.evidenceOfAll += most + sum - each[0];
            return Float64Array.from(each.subarray(1), (logit) => logit - most - sum);
        });
        this.longest = Math.min(maxAnswerLen, this.ends.length);
        /** How many spans there are. */
        this.size = this.ends.length * this.longest - (this.longest * (this.longest - 1)) / 2;
    }

    /**
     * The window's answers, best first; texts may repeat, from the second time on with less.
     *
     * @returns {Iterable<{logEvidence: number, logProbability: number, start: number, end: number}>}
     */
    *ranked() {
        const mergedSpans = MERGED_SPANS[Boolean(this.alignToWords)];
        const merged = new Map();
        for (const span of this.spans(0, mergedSpans)) {
            const text = this.context.slice(span.start, span.end).toLowerCase();
            const known = merged.get(text);
            if (known) known.logProbability = logAddExp(known.logProbability, span.logProbability);
            else merged.set(text, span);
        }
        // None of the others has more than any of these.
        const best = [...merged.values()].sort((one, other) => other.logProbability - one.logProbability);
        for (const span of best) yield this.#withEvidence(span);
        for (const span of this.spans(mergedSpans, this.size)) yield this.#withEvidence(span);
    }

    #withEvidence(span) {
        return { ...span, logEvidence: span.logProbability + this.evidenceOfAll };
    }

    /** The spans from rank `first` to before rank `last`, best first; ties go to the earlier span. */
    *spans(first, last) {
        last = Math.min(last, this.size);
        while (first < last) {
            // A long text has many windows, of whose spans few are ever asked for.
            const until = Math.min(last, Math.max(2 * first, 16));
            for (const { logProbability, firstToken, lastToken } of this.#ofRank(first, until)) {
                let [start, end] = this.window.characters(firstToken, lastToken, this.alignToWords);
                if (this.alignToWords) [start, end] = wholeString(this.context, start, end);
                yield { logProbability, start, end };
            }
            first = until;
        }
    }

    #ofRank(first, last) {
        const scores = new Float64Array(this.size);
        const spans = new Int32Array(2 * this.size);
        let size = 0;
        for (let start = 0; start < this.starts.length; start++) {
            for (let end = start; end < Math.min(start + this.longest, this.ends.length); end++) {
                spans[2 * size] = start;
                spans[2 * size + 1] = end;
                scores[size++] = this.starts[start] + this.ends[end];
            }
        }
        const least = scores.slice().sort()[size - last];
        const top = [];
        for (let i = 0; i < size; i++) if (scores[i] >= least) top.push(i);
        top.sort((one, other) => scores[other] - scores[one] || one - other);
        return top.slice(first, last).map((i) => ({
            logProbability: scores[i],
            firstToken: spans[2 * i],
            lastToken: spans[2 * i + 1],
        }));
    }
}

/** The logarithm of exp(one) + exp(other). */
function logAddExp(one, other) {
    return Math.max(one, other) + Math.log1p(Math.exp(-Math.abs(one - other)));
}

/**
 * The answer `context.slice(start, end)`, ended with its field, then widened to whole strings: see `whole_string` of
 * spans_qualaminilm.py.
 *
 * @param {string} context
 * @param {number} start
 * @param {number} end
 * @returns {[number, number]} start and end
 */
export function wholeString(context, start, end) {
    end = endOfField(context, start, end);
    [start, end] = [Math.min(start, stringAround(context, start)[0]), Math.max(end, stringAround(context, end - 1)[1])];
    for (let mark; (mark = ACCENT.exec(context.slice(end, end + 2))); ) end += mark[0].length;
    return [start, end];
}

/** Where the string that the character at `place` is part of starts and ends; that character alone if it is of none. */
function stringAround(context, place) {
    const alone = [place, place + 1];
    let start = place;
    while (start > Math.max(0, place - LONGEST_RUN) && !APART.test(context[start - 1])) start--;
    let end = place;
    while (end < Math.min(context.length, place + LONGEST_RUN) && !APART.test(context[end])) end++;
    if (end - start >= LONGEST_RUN) return alone;
    const partings = Array.from(context.slice(start, end).matchAll(PARTING), ({ index }) => start + index);
    start = Math.max(start, ...partings.filter((each) => each < place).map((each) => each + 1));
    end = Math.min(end, ...partings.filter((each) => each >= place));
    let run = context.slice(start, end);
    while (run) {
        const isUnmatched = count(run, "(") !== count(run, ")");
        const last = run.at(-1);
        if ("'*:=".includes(run[0]) || (run[0] === "(" && (isUnmatched || last === ")"))) start++;
        else if (".,:!?'*".includes(last) || (last === ")" && isUnmatched)) end--;
        else if (run.endsWith("'s")) end -= 2;
        else if (run[0] === "_" && last === "_" && !NAME.test(run)) [start, end] = [start + 1, end - 1];
        else break;
        run = context.slice(start, end);
    }
    if (run.includes("://")) start += SCHEME.exec(run.slice(0, run.indexOf("://")))?.index ?? 0;
    else start += COUNTRY.exec(run)?.[0].length ?? 0;
    return start <= place && place < end && STRING.test(run) ? [start, end] : alone;
}

function count(text, character) {
    return text.split(character).length - 1;
}

/** Where the answer `context.slice(start, end)` ends so that it does not run over the end of a field. */
function endOfField(context, start, end) {
    start += BLANKS_BEFORE.exec(context.slice(start, end))[0].length;
    let stop = find(context, "\n", start, end);
    if (stop < 0) return end;
    let first = start > 0 ? context.lastIndexOf("\n", start - 1) + 1 : 0;
    while (stop >= 0) {
        const line = context.slice(first, stop).replace(BLANKS_AFTER, "");
        const field = FIELD.exec(line);
        if (field && !(first <= start && start <= first + field.groups.before.length)) {
            if (!goesOn(line, context.slice(stop + 1, stop + 1 + 2 * WRAPPED))) return first + line.length;
        }
        first = stop + 1;
        stop = find(context, "\n", first, end);
    }
    return end;
}

/** Where `wanted` first stands in `text` from `start` to before `end`, or -1. */
function find(text, wanted, start, end) {
    const place = text.indexOf(wanted, start);
    return place < end ? place : -1;
}

/** Whether a paragraph's line goes on in what follows it. */
function goesOn(line, following) {
    following = [...following].slice(0, WRAPPED).join("").split("\n")[0];
    following = following.replace(BLANKS_BEFORE, "").replace(BLANKS_AFTER, "");
    if (!following || FIELD.test(following)) return false;
    return /^\p{Lowercase}/u.test(following) || ",/&(".includes(line.at(-1)) || [...line].length >= WRAPPED;
}
