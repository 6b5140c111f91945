"""Documents to train on: real text, facts scattered in it, questions at the end.

Every task gives facts (lists of ids, put at random places) and questions (ids to read, ids to answer). All start from
plain words, so they are the same for a vocabulary of words and one of byte pairs. The value follows the name directly:
with a token between them small models only learn to guess among the values not yet asked for.
"""
import random

import torch

from .vocabulary import ADJECTIVES, ASK, BOS, CITIES, END, FACT, NAMES, NOUNS


class Document:
    """What the tasks ask for; laid out by Batches."""

    def __init__(self):
        self.facts = []      # lists of ids; never cut
        self.questions = []  # (prompt ids, answer ids)
        self.copies = []     # (prompt length, answer length): quoted from the text itself


class Tasks:
    KINDS = ("single", "multi_key", "multi_value", "two_hop", "frequent", "copy")

    def __init__(self, vocabulary, rng):
        self.rng = rng
        self.word = {w: vocabulary.encode(" " + w) for w in NAMES + CITIES + ["all", "most", "copy", "as"]}

    def cities(self, count):
        return [self.rng.choice(CITIES) for _ in range(count)]

    def ids(self, words):
        return [i for w in words for i in self.word[w]]

    def state(self, document, words):
        document.facts.append([FACT] + self.ids(words) + [END])

    def ask(self, document, words, answer):
        document.questions.append(([ASK] + self.ids(words), self.ids(answer) + [END]))

    def single(self, document, names, asked):
        told = [(name, self.cities(2)) for name in names]
        for name, values in told:
            self.state(document, [name] + values)
        # With replacement: if no fact could be asked for twice, a small model would learn to guess among those not yet
        # asked for, and stay there.
        for name, values in self.rng.choices(told, k=asked):
            self.ask(document, [name], values)

    def multi_key(self, document, count, asked):
        """Names that share their first or second half: only the whole key tells them apart."""
        if self.rng.random() < 0.5:
            half = self.rng.choice(ADJECTIVES)
            names = [half + noun for noun in NOUNS]
        else:
            half = self.rng.choice(NOUNS)
            names = [adjective + half for adjective in ADJECTIVES]
        self.single(document, self.rng.sample(names, min(count, len(names))), asked)

    def multi_value(self, document, name):
        values = self.rng.sample(CITIES, 3)
        for value in values:
            self.state(document, [name, value])
        self.ask(document, ["all", name], values)

    def two_hop(self, document, names, asked):
        """name -> another name -> city, told in any order."""
        pairs = list(zip(names[::2], names[1::2]))
        told = [(a, b, self.cities(1)) for a, b in pairs]
        facts = [[a, "as", b] for a, b, _ in told] + [[b] + city for _, b, city in told]
        self.rng.shuffle(facts)
        for fact in facts:
            self.state(document, fact)
        for a, b, city in self.rng.sample(told, min(asked, len(told))):
            self.ask(document, ["as", a], [b] + city)

    def frequent(self, document):
        """One word stands in the text more often than the others."""
        words = self.rng.sample(CITIES, 4)
        for word, times in zip(words, (9, 4, 3, 2)):
            document.facts += [list(self.word[word]) for _ in range(times)]
        self.ask(document, ["most"], words[:1])

    def make(self, kinds, fact_count, asked):
        document = Document()
        names = self.rng.sample(NAMES, min(len(NAMES), fact_count + 4))
        for kind in kinds:
            if kind == "single":
                self.single(document, names[4:], asked)
            elif kind == "multi_key":
                self.multi_key(document, max(2, fact_count), asked)
            elif kind == "multi_value":
                self.multi_value(document, names[0])
            elif kind == "two_hop":
                self.two_hop(document, names[1:5] if fact_count < 12 else names[4:12], min(2, asked))
            elif kind == "frequent":
                self.frequent(document)
            else:
                document.copies.append((6, 6))
        return document


class Batches:
    """Token ids, loss weights and positions of whole batches."""

    def __init__(self, vocabulary, corpus, kinds, seed, text_share=0.3):
        self.rng = random.Random(seed)
        self.tasks = Tasks(vocabulary, self.rng)
        self.copy_prompt = [ASK] + self.tasks.word["copy"]
        self.corpus, self.kinds, self.text_share = corpus, kinds, text_share

    def lay_out(self, length, fact_count, asked):
        """One document of exactly length + 1 ids: (ids, weights, indices that no gap may follow)."""
        kinds = [self.rng.choice(self.kinds)] if len(self.kinds) == 1 or fact_count < 6 else \
            self.rng.sample(self.kinds, 2)
        document = self.tasks.make(kinds, fact_count, asked)
        fixed = 1 + sum(map(len, document.facts)) + sum(len(p) + len(a) for p, a in document.questions)
        fixed += sum(len(self.copy_prompt) + p + a + 1 for p, a in document.copies)
        body_length = length + 1 - fixed
        if body_length < length // 4:  # too full: fewer facts
            return self.lay_out(length, max(1, fact_count // 2), max(1, asked // 2))
        start = self.rng.randrange(len(self.corpus) - body_length)
        body = self.corpus[start:start + body_length]
        for prompt, answer in document.copies:
            at = self.rng.randrange(body_length - prompt - answer)
            quote = body[at:at + prompt + answer]
            document.questions.append((self.copy_prompt + quote[:prompt], quote[prompt:] + [END]))
        return self.join(body, document, length)

    def join(self, body, document, length):
        answers = sum(len(a) - 1 for _, a in document.questions)
        text_weight = self.text_share * answers / max(1, len(body))
        ids, weights, whole, at = [BOS], [0.0], set(), 0
        cuts = sorted(self.rng.choices(range(len(body) + 1), k=len(document.facts)))
        self.rng.shuffle(document.facts)
        for cut, fact in zip(cuts, document.facts):
            ids += body[at:cut]
            weights += [text_weight] * (cut - at)
            at = cut
            whole.update(range(len(ids) + 1, len(ids) + len(fact)))
            ids += fact
            weights += [0.0] * len(fact)
        ids += body[at:]
        weights += [text_weight] * (len(body) - at)
        self.rng.shuffle(document.questions)
        for prompt, answer in document.questions:
            whole.update(range(len(ids) + 1, len(ids) + len(prompt) + len(answer)))
            ids += prompt + answer
            weights += [0.0] * len(prompt) + [1.0] * (len(answer) - 1) + [0.0]
        assert len(ids) == length + 1
        return ids, weights, whole

    def positions(self, length, whole, position_max):
        """0, 1, 2 ... with jumps at up to three places, so that far distances are seen in short documents."""
        positions = torch.arange(length)
        pieces, room = self.rng.choice((1, 2, 4)), position_max - length
        free = [i for i in range(1, length) if i not in whole]
        if pieces == 1 or room <= 0 or len(free) < pieces:
            return positions
        jumps = sorted(self.rng.randrange(room) for _ in range(pieces - 1))
        for cut, before, jump in zip(sorted(self.rng.sample(free, pieces - 1)), [0] + jumps, jumps):
            positions[cut:] += jump - before
        return positions

    def make(self, size, length, fact_count, position_max, asked=8):
        ids, weights, positions = [], [], []
        for _ in range(size):
            one_ids, one_weights, whole = self.lay_out(length, fact_count, min(asked, fact_count))
            ids.append(one_ids)
            weights.append(one_weights)
            positions.append(self.positions(length, whole, position_max))
        return torch.tensor(ids), torch.tensor(weights), torch.stack(positions)
