/**
 * QuaLA-MiniLM in JavaScript: in a browser by onnxruntime-web, in Node 20 or newer by onnxruntime-node.
 *
 *     import * as ort from "onnxruntime-node";
 *     import { QuestionAnswering } from "./qualaminilm/qualaminilm.js";
 *     const qa = await QuestionAnswering.load(ort, (name) => readFile(join("model", name)));
 *     await qa.answer({ question: "Where do I live?", context: "I live in Berlin." }, { length_config: "fast" });
 *
 * Options and answers are called as in Python's pipeline. Places are UTF-16 code units, which JavaScript's strings are
 * indexed by, where Python counts code points: `context.slice(start, end)` is `answer` in both.
 */

import { ValueError, shown } from "./errors.js";
import { LengthConfigs } from "./length_configs.js";
import { Reading, checkExample, checkOptions } from "./reading.js";
import { Tokenizer } from "./tokenizer.js";

export { LengthConfigs, Reading, Tokenizer, ValueError };

/** What a folder that `python -m recipe.browser` wrote holds of the model. */
export const FILES = {
    config: "config.json",
    presets: "length_configs.json",
    tokenizer: "tokenizer.json",
    tokenizerConfig: "tokenizer_config.json",
    graph: "model.onnx",
};
const MOST = 2 ** 24; // tokens that an entry of the graph's length_config may count
const OPTIONS = [
    "align_to_words",
    "doc_stride",
    "handle_impossible_answer",
    "length_config",
    "max_answer_len",
    "max_question_len",
    "max_seq_len",
    "no_answer_threshold",
    "progress",
    "return_answerable",
    "top_k",
];

/** Answers questions with spans of their contexts. */
export class QuestionAnswering {
    /**
     * Reads a model out of its files.
     *
     * @param {object} ort the package onnxruntime-web or onnxruntime-node
     * @param {(name: string) => Promise<Uint8Array>} read the content of one of the model's files
     * @param {object} [sessionOptions] as of `ort.InferenceSession.create`
     * @returns {Promise<QuestionAnswering>}
     * @throws {ValueError} files that are no such model's
     */
    static async load(ort, read, sessionOptions = {}) {
        const contents = Object.entries(FILES).map(async ([kind, name]) => {
            const bytes = await read(name);
            return [kind, kind === "graph" ? bytes : JSON.parse(new TextDecoder().decode(bytes))];
        });
        const files = Object.fromEntries(await Promise.all(contents));
        const session = await ort.InferenceSession.create(files.graph, sessionOptions);
        return new QuestionAnswering(ort, session, files);
    }

    constructor(ort, session, { config, presets, tokenizer, tokenizerConfig }) {
        if ((config.embedding_type ?? "bert") !== "bert") {
            throw new ValueError(`embedding_type is ${shown(config.embedding_type)} in config.json, expected "bert"`);
        }
        // Where it is optional, some runtimes refuse it, and others leave it unread without a word.
        if (!session.inputNames.includes("length_config")) {
            throw new ValueError(
                `the graph takes ${session.inputNames.join(", ")}, but no length_config, or none that must be given: ` +
                    "python -m recipe.browser writes one",
            );
        }
        this.ort = ort;
        this.session = session;
        this.lengthConfigs = new LengthConfigs(config, presets);
        this.reading = new Reading(new Tokenizer(tokenizer), {
            maxSeqLen: Math.min(tokenizerConfig.model_max_length ?? Infinity, 384),
            positions: config.max_position_embeddings,
            noAnswerThreshold: config.no_answer_threshold,
            answerableCalibration: config.answerable_calibration,
        });
        /** The last text that was read, and its tokens: often several questions are about one. */
        this.last = { context: undefined, tokens: undefined };
    }

    /** The names of the presets. */
    get presets() {
        return Object.keys(this.lengthConfigs.presets);
    }

    /**
     * Answers a question.
     *
     * @param {{question: string, context: string}} example
     * @param {object} [options] those of Python's pipeline, by the same names: align_to_words, doc_stride,
     *     handle_impossible_answer, length_config, max_answer_len, max_question_len, max_seq_len, no_answer_threshold,
     *     return_answerable, top_k
     * @param {(share: number) => void} [options.progress] called with the share of the text that has been read
     * @returns {Promise<import("./reading.js").Answer | import("./reading.js").Answer[]>} one, or where `top_k` is above
     *     1 an array of at most as many
     * @throws {ValueError} a text or an option that is none of what is accepted
     */
    async answer(example, options = {}) {
        for (const name of Object.keys(options)) {
            if (!OPTIONS.includes(name)) {
                throw new ValueError(`unknown option ${shown(name)}. Accepted: ${OPTIONS.join(", ")}`);
            }
        }
        checkOptions(options);
        checkExample(example);
        const { question, context } = example;
        const lengths = this.lengthConfigs.tokenLengths(options.length_config);
        if (this.last.context !== context) this.last = { context, tokens: this.reading.tokens(context) };
        const windows = this.reading.windows(question, this.last.tokens, options);
        const logits = [];
        // One by one: of a single thread, batches ask no less time.
        for (const window of windows) {
            logits.push(await this.logits(window, lengths));
            options.progress?.(logits.length / windows.length);
        }
        return this.reading.best(context, windows, logits, options);
    }

    /**
     * What the model makes of a window.
     *
     * @param {import("./reading.js").Window} window
     * @param {import("./length_configs.js").TokenLengths} lengths
     * @returns {Promise<Float32Array[]>} logits of starts and of ends, what `window.scored` gives
     */
    async logits(window, lengths) {
        const { Tensor } = this.ort;
        const entries = lengths.entries.map((each) => (lengths.relative ? each / 1000 : Math.min(each, MOST)));
        const inputs = { length_config: new Tensor("float32", Float32Array.from(entries), [entries.length]) };
        for (const [name, values] of Object.entries(window.modelInputs())) {
            inputs[name] = new Tensor("int64", BigInt64Array.from(values, BigInt), [1, window.length]);
        }
        const outputs = await this.session.run(inputs);
        return ["start_logits", "end_logits"].map((name) => window.scored(outputs[name].data));
    }
}
