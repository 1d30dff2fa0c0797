/**
 * What Python's tests ask of the JavaScript: `node javascript.mjs FOLDER RUNTIME`, with a JSON array of calls,
 * `[function, ...arguments]`, at the standard input. Prints an array of `{value}` or `{error}`.
 */

import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { text } from "node:stream/consumers";

import {
    LengthConfigs,
    QuestionAnswering,
    Reading,
    Tokenizer,
    ValueError,
} from "../demo/browser/qualaminilm/qualaminilm.js";
import { checkExample, checkOptions } from "../demo/browser/qualaminilm/reading.js";
import { wholeString } from "../demo/browser/qualaminilm/spans.js";

const [folder, runtime] = process.argv.slice(2);
const read = (name) => readFile(join(folder, name));
const [config, presets, tokenizer] = await Promise.all(
    ["config.json", "length_configs.json", "tokenizer.json"].map(async (name) => JSON.parse(await read(name))),
);
const reading = new Reading(new Tokenizer(tokenizer), { maxSeqLen: 384, positions: config.max_position_embeddings });
const lengthConfigs = new LengthConfigs(config, presets);
let loading;

const FUNCTIONS = {
    tokens: (content) => reading.tokenizer.tokens(content),
    wholeString,
    checkExample,
    checkOptions,
    tokenLengths: (lengthConfig) => lengthConfigs.tokenLengths(lengthConfig),
    macs: (lengthConfig, n) => lengthConfigs.macs(lengthConfig, n),

    /** The windows of a text, and the answers in given logits: an array a window, of those of starts and of ends. */
    best(question, context, options, logits) {
        const windows = reading.windows(question, reading.tokens(context), options);
        const given = logits.map((window) => window.map((each) => Float32Array.from(each)));
        return {
            windows: windows.map((window) => window.modelInputs()),
            answers: reading.best(context, windows, given, options),
        };
    },

    /** What the graph makes of a text's only window. */
    async logits(question, context, lengthConfig) {
        const qa = await load();
        const [window] = qa.reading.windows(question, qa.reading.tokens(context));
        return (await qa.logits(window, qa.lengthConfigs.tokenLengths(lengthConfig))).map((each) => [...each]);
    },

    answer: async (question, context, options) => (await load()).answer({ question, context }, options),
};

function load() {
    const ort = createRequire(new URL("../demo/browser/package.json", import.meta.url))(runtime);
    loading ??= QuestionAnswering.load(ort, read);
    return loading;
}

const results = [];
for (const [name, ...given] of JSON.parse(await text(process.stdin))) {
    try {
        results.push({ value: await FUNCTIONS[name](...given) });
    } catch (error) {
        if (!(error instanceof ValueError)) throw error;
        results.push({ error: error.message });
    }
}
process.stdout.write(JSON.stringify(results));
