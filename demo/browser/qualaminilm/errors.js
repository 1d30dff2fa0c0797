/** What is wrong with what a caller gave: its message names the argument, what was given and what is accepted. */
export class ValueError extends Error {
    name = "ValueError";
}

/** A value as a message shows it. */
export function shown(value) {
    const text = JSON.stringify(value) ?? String(value);
    return text.length > 60 ? `${text.slice(0, 57)}...` : text;
}
