/** What the page does: it asks the worker, and shows what it says. */

import { loadPdfjs, textOf } from "./texts.js";

const QUESTION = "Why were pyramids built rather than other shapes?";
const CONTEXT =
    "Structural engineering dates back to 2700 B.C.E. when the step pyramid for Pharaoh Djoser was built by Imhotep, " +
    "the first engineer in history known by name. Pyramids were the most common major structures built by ancient " +
    "civilizations because the structural form of a pyramid is inherently stable and can be almost infinitely scaled " +
    "(as opposed to most other structural forms, which cannot be linearly increased in size in proportion to increased " +
    "loads).";

const elements = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
const waiting = new Map();
let number = 0;

/** Asks the worker, and resolves to its result. */
function ask(request, progress = () => {}) {
    return new Promise((resolve, reject) => {
        waiting.set(++number, { resolve, reject, progress });
        worker.postMessage({ ...request, id: number });
    });
}

worker.addEventListener("message", ({ data }) => {
    if (data.progress !== undefined) {
        waiting.get(data.id).progress(data.progress);
        return;
    }
    const { resolve, reject } = waiting.get(data.id);
    waiting.delete(data.id);
    if (data.error !== undefined) reject(new Error(data.error));
    else resolve(data.result);
});
worker.addEventListener("error", (event) => show(`The model cannot be loaded: ${event.message ?? "see the console"}`));

/** Shows a message, empty where all is well. */
function show(message) {
    elements.message.textContent = message;
    if (message) elements.status.textContent = "";
}

let busy = true; // until the model is loaded
let again = false;
let turn = 0; // an answer whose turn is over is not shown

/** Answers what stands in the form; while it is at it, only the last of the questions that come is remembered. */
async function answer() {
    again = busy;
    if (busy) return;
    busy = true;
    show("");
    elements.result.hidden = true;
    elements.status.textContent = "Reading";
    const example = { question: elements.question.value, context: elements.context.value };
    const begun = turn;
    try {
        for (const [name, text] of [["question", example.question], ["text", example.context]]) {
            if (!text.trim()) throw new Error(`Type a ${name} first.`);
        }
        const options = {
            length_config: elements.preset.value,
            handle_impossible_answer: true,
            return_answerable: true,
        };
        const found = await ask({ example, options }, showProgress);
        if (turn === begun) showAnswer(example.context, found);
    } catch (error) {
        if (turn === begun) show(error.message);
    }
    elements.progress.hidden = true;
    busy = false;
    if (again) answer();
}

function showProgress(share) {
    elements.progress.hidden = share === 1;
    elements.progress.value = share;
}

function showAnswer(context, { answer, start, end, score, answerable, milliseconds }) {
    const percent = (share) => `${Math.round(100 * share)}%`;
    elements.status.textContent = "";
    elements.answer.textContent = answer || "Not in the text";
    elements.measures.textContent =
        (answer ? `confidence ${percent(score)}, ` : "") +
        `${percent(answerable)} sure that the text answers the question, ${Math.round(milliseconds)} ms`;
    const mark = document.createElement("mark");
    mark.textContent = context.slice(start, end);
    elements.passage.replaceChildren(context.slice(0, start), ...(answer ? [mark] : []), context.slice(end));
    elements.result.hidden = false;
    // Within the passage alone: the page stays where it is.
    elements.passage.scrollTop = answer ? mark.offsetTop - elements.passage.offsetTop - 80 : 0;
}

async function readFile(file) {
    show("");
    elements.status.textContent = `Reading ${file.name}`;
    try {
        elements.context.value = await textOf(file);
    } catch (error) {
        show(error.message);
        return;
    } finally {
        // What is being answered meanwhile was asked of the text before.
        turn += 1;
        again = false;
        elements.result.hidden = true;
    }
    elements.question.focus();
    elements.question.select();
    elements.status.textContent = `${file.name} is read: ask your question`;
}

async function start() {
    elements.question.value ||= QUESTION;
    elements.context.value ||= CONTEXT;
    elements.status.textContent = "Loading the model";
    for (const { name, share } of await ask({})) {
        const label = name === "full" ? name : `${name}: ${Math.round(100 * share)}% of the work`;
        elements.preset.add(new Option(label, name));
    }
    busy = false;
    await answer();
    await loadPdfjs();
}

elements.form.addEventListener("submit", (event) => {
    event.preventDefault();
    answer();
});
elements.preset.addEventListener("change", answer);
elements.file.addEventListener("change", () => {
    if (elements.file.files.length) readFile(elements.file.files[0]);
    elements.file.value = "";
});
document.addEventListener("dragover", (event) => {
    event.preventDefault();
    elements.context.classList.add("over");
});
document.addEventListener("dragleave", () => elements.context.classList.remove("over"));
document.addEventListener("drop", (event) => {
    event.preventDefault();
    elements.context.classList.remove("over");
    if (event.dataTransfer.files.length) readFile(event.dataTransfer.files[0]);
});

start().catch((error) => show(error.message));
