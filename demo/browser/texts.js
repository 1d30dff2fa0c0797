/** The text of a file that somebody dropped. */

const LARGEST = 20e6; // bytes
const PDFJS = new URL("./pdfjs-dist/", import.meta.url).href;
/** What is not read of a page in HTML. */
const UNREAD = "script, style, noscript, template, svg, head";
const BLOCKS =
    "address, article, aside, blockquote, br, dd, div, dl, dt, fieldset, figcaption, figure, footer, form, h1, h2, h3, " +
    "h4, h5, h6, header, hr, li, main, nav, ol, p, pre, section, table, td, th, tr, ul";
const READERS = { txt: plain, md: plain, html, htm: html, pdf };

/**
 * @param {File} file
 * @returns {Promise<string>}
 * @throws {Error} one line that names the file, and what is wrong with it
 */
export async function textOf(file) {
    const reader = READERS[file.name.split(".").at(-1).toLowerCase()];
    if (!reader) throw new Error(`${file.name} is of a kind that is not read: expected txt, md, html or pdf`);
    if (file.size > LARGEST) {
        throw new Error(`${file.name} has ${Math.ceil(file.size / 1e6)} MB, at most ${LARGEST / 1e6} MB are read`);
    }
    let text;
    try {
        text = await reader(new Uint8Array(await file.arrayBuffer()));
    } catch (error) {
        throw new Error(`${file.name} cannot be read: ${reason(error)}`);
    }
    if (!text.trim()) {
        const scan = reader === pdf ? ": is it a scan, a picture of a text?" : "";
        throw new Error(`${file.name} holds no text${scan}`);
    }
    return text;
}

function reason(error) {
    if (error.name === "PasswordException") return "it is encrypted";
    if (error.name === "InvalidPDFException") return "it is no whole PDF";
    return error.message;
}

/** UTF-8, or as its first bytes say; what is none of these is taken for Western Europe's. */
function plain(bytes) {
    const marks = { "255,254": "utf-16le", "254,255": "utf-16be" };
    const marked = marks[bytes.subarray(0, 2).join()];
    try {
        return new TextDecoder(marked ?? "utf-8", { fatal: true }).decode(bytes);
    } catch {
        return new TextDecoder("windows-1252").decode(bytes);
    }
}

function html(bytes) {
    const page = new DOMParser().parseFromString(plain(bytes), "text/html");
    for (const element of page.querySelectorAll(UNREAD)) element.remove();
    for (const element of page.querySelectorAll(BLOCKS)) {
        element.before("\n");
        element.after("\n");
    }
    return page.documentElement.textContent.replace(/[ \t]+/g, " ").replace(/ ?\n[ \n]*\n ?/g, "\n\n").trim();
}

let pdfjs;

/** Loads what reads PDFs, once, so that it is there when there is no network. */
export async function loadPdfjs() {
    pdfjs ??= import(`${PDFJS}pdf.min.mjs`).then((loaded) => {
        loaded.GlobalWorkerOptions.workerSrc = `${PDFJS}pdf.worker.min.mjs`;
        return { ...loaded, worker: new loaded.PDFWorker() };
    });
    return pdfjs;
}

async function pdf(bytes) {
    const { getDocument, worker } = await loadPdfjs();
    const task = getDocument({ data: bytes, worker, isEvalSupported: false, disableFontFace: true, verbosity: 0 });
    try {
        const document = await task.promise;
        const pages = [];
        for (let number = 1; number <= document.numPages; number++) {
            const { items } = await (await document.getPage(number)).getTextContent();
            pages.push(items.map(({ str, hasEOL }) => str + (hasEOL ? "\n" : "")).join(""));
        }
        return pages.join("\n\n").trim();
    } finally {
        await task.destroy();
    }
}
