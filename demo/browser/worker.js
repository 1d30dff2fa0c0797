/** The model, apart from the page, which stays quick while it computes. Messages have the `id` of what they answer. */

import * as ort from "./onnxruntime-web/ort.wasm.bundle.min.mjs";
import { QuestionAnswering } from "./qualaminilm/qualaminilm.js";

async function read(name) {
    const response = await fetch(new URL(`./model/${name}`, import.meta.url));
    if (!response.ok) throw new Error(`model/${name} cannot be had: ${response.status} ${response.statusText}`);
    return new Uint8Array(await response.arrayBuffer());
}

const loading = QuestionAnswering.load(ort, read);

async function presets() {
    return Object.entries((await loading).lengthConfigs.presets).map(([name, { macs_share: share }]) => ({ name, share }));
}

async function answer(id, { example, options }) {
    const qa = await loading;
    const started = performance.now();
    const progress = (share) => self.postMessage({ id, progress: share });
    const found = await qa.answer(example, { ...options, progress });
    return { ...found, milliseconds: performance.now() - started };
}

self.addEventListener("message", async ({ data: { id, ...request } }) => {
    try {
        self.postMessage({ id, result: await (request.example ? answer(id, request) : presets()) });
    } catch (error) {
        self.postMessage({ id, error: error.message });
    }
});
