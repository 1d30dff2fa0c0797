/** How many tokens each layer hands on: length_configs_qualaminilm.py in JavaScript. */

import { ValueError, shown } from "./errors.js";

const ACCEPTED =
    "a preset's name, one int >= 2 a layer, one number in (0, 1] a layer, or {max_macs: share in (0, 1]}; " +
    "entries are non-increasing";

/**
 * @typedef {string | number[] | {max_macs: number}} LengthConfig JavaScript's 1 is 1.0: as an entry, a share
 */

/**
 * How many tokens each layer hands on: a `length_config` read and checked.
 *
 * @typedef {object} TokenLengths
 * @property {number[]} entries one a layer, tokens or thousandths of a row's real tokens
 * @property {boolean} relative whether the entries are thousandths
 */

/** What a model's sizes and presets make of a `length_config`. */
export class LengthConfigs {
    /**
     * @param {object} config what stands in config.json
     * @param {object} presets what stands in length_configs.json
     * @throws {ValueError} the presets are none, or another model's
     */
    constructor(config, presets) {
        if (presets.num_hidden_layers !== config.num_hidden_layers || typeof presets.presets !== "object") {
            throw new ValueError(
                `length_configs.json is for ${shown(presets.num_hidden_layers)} layers, config.json says ` +
                    shown(config.num_hidden_layers),
            );
        }
        this.config = config;
        /** The presets by name, `"full"` first. */
        this.presets = { full: { length_config: Array(config.num_hidden_layers).fill(1) }, ...presets.presets };
        for (const name of Object.keys(this.presets)) this.tokenLengths(name);
    }

    /**
     * Reads a `length_config`; `undefined` is the model's own.
     *
     * @param {LengthConfig} [lengthConfig]
     * @returns {TokenLengths}
     * @throws {ValueError} it names the entry at fault and what would be accepted
     */
    tokenLengths(lengthConfig) {
        lengthConfig ??= this.config.length_config ?? "full";
        if (typeof lengthConfig === "string") {
            if (!Object.hasOwn(this.presets, lengthConfig)) {
                const names = Object.keys(this.presets).map(shown).join(", ");
                throw new ValueError(
                    `length_config is ${shown(lengthConfig)}, which is no preset; the presets are ${names}. ` +
                        `Accepted: ${ACCEPTED}`,
                );
            }
            return this.#readEntries(this.presets[lengthConfig].length_config, `preset ${shown(lengthConfig)}`);
        }
        if (Array.isArray(lengthConfig)) return this.#readEntries(lengthConfig, "length_config");
        return this.#withinMaxMacs(lengthConfig);
    }

    #readEntries(entries, name) {
        const layers = this.config.num_hidden_layers;
        if (!Array.isArray(entries) || entries.length !== layers) {
            throw new ValueError(`${name} is ${shown(entries)}, the model has ${layers} layers. Accepted: ${ACCEPTED}`);
        }
        const relative = entries[0] <= 1;
        const read = [];
        for (const [i, entry] of entries.entries()) {
            const value = relative ? roundHalfToEven(entry * 1000) : entry;
            let fault;
            if (typeof entry !== "number") fault = `a ${typeof entry}`;
            else if (relative && !(value > 0 && entry <= 1)) fault = "not in (0, 1] when read to three decimals";
            else if (!relative && !(Number.isInteger(entry) && entry >= 2)) fault = "no int >= 2";
            else if (i && value > read[i - 1]) fault = `more than the entry before it, ${shown(entries[i - 1])}`;
            if (fault) {
                throw new ValueError(`entry ${i} of ${name} is ${shown(entry)}, ${fault}. Accepted: ${ACCEPTED}`);
            }
            read.push(value);
        }
        return { entries: read, relative };
    }

    #withinMaxMacs(wanted) {
        const share = wanted?.max_macs;
        if (typeof share !== "number" || !(share > 0 && share <= 1) || Object.keys(wanted).length !== 1) {
            throw new ValueError(`length_config is ${shown(wanted)}. Accepted: ${ACCEPTED}`);
        }
        const shares = new Map(Object.keys(this.presets).map((name) => [name, this.macsShare(name)]));
        const within = [...shares.keys()].filter((name) => shares.get(name) <= share);
        if (!within.length) {
            const cheapest = [...shares.keys()].reduce((one, other) => (shares.get(other) < shares.get(one) ? other : one));
            throw new ValueError(
                `length_config is ${shown(wanted)}, but the cheapest preset, ${shown(cheapest)}, has a MACs share of ` +
                    shares.get(cheapest).toFixed(3),
            );
        }
        if (within.includes("full")) return this.tokenLengths("full"); // what a cheaper preset is better by is noise
        const f1 = new Map(within.map((name) => [name, this.presets[name].validation?.f1]));
        const worth = [...f1.values()].includes(undefined) ? shares : f1;
        return this.tokenLengths(within.reduce((one, other) => (worth.get(other) > worth.get(one) ? other : one)));
    }

    /**
     * Multiply-accumulates of the layers for one row of `n` real tokens, by formula.
     *
     * @param {LengthConfig} [lengthConfig]
     * @param {number} [n]
     */
    macs(lengthConfig, n = 384) {
        const { entries, relative } = this.tokenLengths(lengthConfig);
        const { hidden_size: d, intermediate_size: dFf, significance } = this.config;
        let total = 0;
        let entering = n;
        for (const entry of entries) {
            const leaving = Math.min(n, relative ? Math.max(2, Math.floor((entry * n + 999) / 1000)) : entry);
            const queries = significance === "attention" ? entering : leaving;
            total += 2 * entering * d * d + 2 * queries * d * d + 2 * entering * queries * d + 2 * leaving * d * dFf;
            entering = leaving;
        }
        return total;
    }

    /** MACs of a `length_config` as a share of `"full"`'s. */
    macsShare(lengthConfig, n = 384) {
        return this.macs(lengthConfig, n) / this.macs("full", n);
    }
}

function roundHalfToEven(number) {
    const below = Math.floor(number);
    return number - below === 0.5 ? below + (below % 2) : Math.round(number);
}
