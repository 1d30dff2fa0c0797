"""The model computed one row and one token at a time, from the paper's description: no gathers, batches or masks."""

import math

import torch


class BruteForce:
    def __init__(self, model):
        self.config = model.config
        self.weights = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}

    def logits(self, input_ids, attention_mask, length_config):
        """Start and end logits as {(row, position): (start, end)}, kept tokens as one list of lists a layer, and hidden
        states as {(layer, row, position): vector}, for real tokens only."""
        logits, hidden_states = {}, {}
        kept_tokens = [[] for _ in range(self.config.num_hidden_layers)]
        for row in range(len(input_ids)):
            states, kept, hidden = self._row(input_ids[row].tolist(), attention_mask[row].tolist(), length_config)
            for position, state in states.items():
                logits[row, position] = self._linear("qa_outputs", state).tolist()
            for layer, positions in enumerate(kept):
                kept_tokens[layer].append(positions)
            for (layer, position), state in hidden.items():
                hidden_states[layer, row, position] = state
        return logits, kept_tokens, hidden_states

    def _row(self, ids, mask, length_config):
        real = [position for position, value in enumerate(mask) if value]
        on_their_way = {position: self._embed(ids, position) for position in real}
        restored, kept_tokens, hidden = dict(on_their_way), [], {}
        for position in real:
            hidden[0, position] = restored[position]
        for layer in range(self.config.num_hidden_layers):
            on_their_way = self._layer(layer, on_their_way, self._keep(length_config[layer], len(real)))
            restored.update(on_their_way)
            kept_tokens.append(sorted(on_their_way))
            for position in real:
                hidden[layer + 1, position] = restored[position]
        return restored, kept_tokens, hidden

    def _keep(self, entry, n):
        if isinstance(entry, int):
            return min(n, entry)
        thousandths = round(entry * 1000)
        return min(n, max(2, (thousandths * n + 999) // 1000))

    def _embed(self, ids, position):
        number = position
        if self.config.embedding_type == "roberta":
            padding = self.config.pad_token_id
            number = padding
            if ids[position] != padding:
                number += sum(1 for earlier in ids[: position + 1] if earlier != padding)
        total = (
            self._row_of("bert.embeddings.word_embeddings", ids[position])
            + self._row_of("bert.embeddings.position_embeddings", number)
            + self._row_of("bert.embeddings.token_type_embeddings", 0)
        )
        return self._norm("bert.embeddings.LayerNorm", total)

    def _layer(self, layer, states, keep):
        prefix = f"bert.encoder.layer.{layer}."
        heads = self.config.num_attention_heads
        size = self.config.hidden_size // heads
        query, key, value = (
            {p: self._linear(f"{prefix}attention.self.{name}", state).split(size) for p, state in states.items()}
            for name in ("query", "key", "value")
        )
        attention, received = {}, dict.fromkeys(states, 0.0)
        for p in states:
            parts = []
            for head in range(heads):
                scores = {q: math.exp(query[p][head].dot(key[q][head]).item() / math.sqrt(size)) for q in states}
                total = sum(scores.values())
                for q in states:
                    received[q] += scores[q] / total
                parts.append(sum(scores[q] / total * value[q][head] for q in states))
            attention[p] = torch.cat(parts)
        significance = received
        if self.config.significance == "learned":
            significance = self._scores(prefix + "scorer.", states)
        first, *others = sorted(states)
        others.sort(key=lambda p: (-significance[p], p))
        return {p: self._finish(prefix, attention[p], states[p]) for p in [first, *others][:keep]}

    def _finish(self, prefix, attention, state):
        state = self._norm(
            prefix + "attention.output.LayerNorm", self._linear(prefix + "attention.output.dense", attention) + state
        )
        inner = self._gelu(self._linear(prefix + "intermediate.dense", state))
        return self._norm(prefix + "output.LayerNorm", self._linear(prefix + "output.dense", inner) + state)

    def _scores(self, prefix, states):
        heads, size = 4, 8
        own = []
        parts = [self._linear(prefix + "dense", states[p]) for p in sorted(states)]
        features = len(parts[0]) - heads * (size + 1)
        for part in parts:
            matches = []
            for head in range(heads):
                vectors = [each[features + head * size : features + (head + 1) * size] for each in parts]
                vectors = [vector / vector.norm() for vector in vectors]
                mine = part[features + head * size : features + (head + 1) * size]
                mine = mine / mine.norm()
                gates = [torch.sigmoid(each[features + heads * size + head]) for each in parts]
                matches.append(max((mine.dot(vector) * gate).item() for vector, gate in zip(vectors, gates)))
            own.append(torch.cat((self._gelu(part[:features]), torch.tensor(matches, dtype=part.dtype))))
        kernel = self.weights[prefix + "neighbourhood.weight"].squeeze(1)
        scores = {}
        for i, position in enumerate(sorted(states)):
            around = self.weights[prefix + "neighbourhood.bias"].clone()
            for offset in range(-16, 17):
                if 0 <= i + offset < len(own):
                    around += kernel[:, 16 + offset] * own[i + offset]
            both = torch.cat((own[i], self._gelu(around)))
            scores[position] = (self.weights[prefix + "out_proj.weight"] @ both).item()
        return scores

    def _gelu(self, state):
        return state * 0.5 * (1 + torch.erf(state / math.sqrt(2)))

    def _row_of(self, name, number):
        scale = self.weights[name + ".weight_scale"][number] if name + ".weight_scale" in self.weights else 1
        return self.weights[name + ".weight"][number] * scale

    def _linear(self, name, state):
        if name + ".weight_scale" in self.weights:
            scale, zero_point = self.weights[name + ".input_scale"], self.weights[name + ".input_zero_point"]
            smooth = state / self.weights[name + ".smoothing"]
            quantized = torch.clamp(torch.floor(smooth / scale + zero_point + 0.5), 0, 255) - zero_point
            product = self.weights[name + ".weight"] @ quantized
            return product * self.weights[name + ".weight_scale"] * scale + self.weights[name + ".bias"]
        return self.weights[name + ".weight"] @ state + self.weights[name + ".bias"]

    def _norm(self, name, state):
        centred = state - state.mean()
        scaled = centred / torch.sqrt((centred**2).mean() + self.config.layer_norm_eps)
        return scaled * self.weights[name + ".weight"] + self.weights[name + ".bias"]
