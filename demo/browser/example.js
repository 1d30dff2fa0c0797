/**
 * Answers in Node: `node example.js MODEL QUESTION TEXT [PRESET]`. MODEL is the folder model/ of what
 * `python -m recipe.browser` wrote. Prints the answer as JSON; its text is empty where TEXT does not answer.
 */

import { readFile } from "node:fs/promises";
import { join } from "node:path";

import * as ort from "onnxruntime-node";

import { QuestionAnswering } from "./qualaminilm/qualaminilm.js";

const [folder, question, context, preset] = process.argv.slice(2);
try {
    if (context === undefined) throw new Error("usage: node example.js MODEL QUESTION TEXT [PRESET]");
    const qa = await QuestionAnswering.load(ort, (name) => readFile(join(folder, name)));
    const options = { length_config: preset, handle_impossible_answer: true };
    console.log(JSON.stringify(await qa.answer({ question, context }, options)));
} catch (error) {
    console.error(error.message);
    process.exitCode = 1;
}
