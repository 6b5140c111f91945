"""Words or byte pairs: from text to ids, and the tokenizer.json that says the same to a reader.

Names and cities are single words that no text contains often, so that a fact is not guessed.
"""
import heapq
import re
from collections import Counter, defaultdict

SPECIAL = ("<pad>", "<bos>", "<unk>", "<fact>", "<reserved0>", "<end>", "<ask>", "<eos>")
PAD, BOS, UNK, FACT, RESERVED, END, ASK, EOS = range(len(SPECIAL))

ADJECTIVES = "amber azure bronze cobalt copper coral crimson ebony golden indigo ivory jade olive pearl ruby silver".split()
NOUNS = ("badger condor dolphin falcon ferret gazelle heron jackal lemur marten otter panther raven salmon tapir "
         "walrus").split()
NAMES = [a + n for a in ADJECTIVES for n in NOUNS]
CITIES = ("oslo lima cairo paris delhi tokyo quito sofia minsk accra dakar hanoi kabul kyiv lagos lusaka malta milan "
          "miami osaka perth porto prague riga rome seoul sydney tallinn tbilisi tehran tunis turin vienna vilnius "
          "warsaw yerevan zagreb zurich athens baghdad bangkok beirut berlin bern bogota adelaide brussels bucharest "
          "budapest caracas chicago dallas denver dhaka doha dubai dublin geneva glasgow havana helsinki houston "
          "jakarta karachi").split()


def added_tokens(lstrip):
    return [{"id": i, "content": t, "single_word": False, "lstrip": lstrip, "rstrip": False, "normalized": False,
             "special": True} for i, t in enumerate(SPECIAL)]


def document(added, normalizer, pre_tokenizer, decoder, model):
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder, "model": model}


class Words:
    """Lower-case words, single digits, single marks; the commonest of the text, all else <unk>."""
    PATTERN = r"[a-z]+|\d|[^\sa-z\d]"

    def __init__(self, documents, common=1490):
        counts = Counter(w for text in documents for w in re.findall(self.PATTERN, text.lower()))
        taken = set(NAMES) | set(CITIES)
        words = [w for w, _ in counts.most_common(common + len(taken)) if w not in taken and not w.isdigit()]
        self._set(list(SPECIAL) + NAMES + CITIES + words[:common])

    def _set(self, tokens):
        self.tokens, self.size = tokens, len(tokens)
        self.ids = {token: i for i, token in enumerate(tokens)}

    @classmethod
    def from_model(cls, model):
        vocabulary = cls.__new__(cls)
        vocabulary._set(sorted(model["vocab"], key=model["vocab"].get))
        return vocabulary

    def encode(self, text):
        return [self.ids.get(w, UNK) for w in re.findall(self.PATTERN, text.lower())]

    def tokenizer_json(self):
        split = {"type": "Split", "pattern": {"Regex": self.PATTERN}, "behavior": "Isolated", "invert": False}
        return document(added_tokens(False), {"type": "Lowercase"},
                        {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, split]}, None,
                        {"type": "WordLevel", "vocab": self.ids, "unk_token": "<unk>"})


def byte_symbols():
    """GPT-2's printable characters for the 256 bytes."""
    symbols, after = [], 256
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or byte >= 0xAE:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(after))
            after += 1
    return symbols


class BytePairs:
    """Byte-level BPE, trained here. The pattern uses ASCII classes only, so that every regex engine agrees."""
    PATTERN = r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"

    def __init__(self, documents, size=8192):
        self.symbols = byte_symbols()
        counts = Counter(w for text in documents for w in re.findall(self.PATTERN, text))
        words = [w for w, n in counts.most_common(60_000)]
        self.tokens = list(SPECIAL) + self.symbols
        self.merges = []
        self._train([self._split(w) for w in words], [counts[w] for w in words], size)
        self._index()

    def _index(self):
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.size = len(self.tokens)
        self._cache = {}

    @classmethod
    def from_model(cls, model):
        vocabulary = cls.__new__(cls)
        vocabulary.symbols = byte_symbols()
        vocabulary.tokens = sorted(model["vocab"], key=model["vocab"].get)
        vocabulary.merges = [tuple(merge.split(" ")) for merge in model["merges"]]
        vocabulary._index()
        return vocabulary

    def _split(self, word):
        return [self.symbols[b] for b in word.encode()]

    def _train(self, words, counts, size):
        pairs, where = Counter(), defaultdict(set)
        for i, word in enumerate(words):
            for pair in zip(word, word[1:]):
                pairs[pair] += counts[i]
                where[pair].add(i)
        known = set(self.tokens)
        heap = [(-n, pair) for pair, n in pairs.items()]  # lazily: entries whose count has changed are passed over
        heapq.heapify(heap)
        while len(self.tokens) < size and heap:
            count, best = heapq.heappop(heap)
            if -count != pairs[best] or -count < 2:
                continue
            self.merges.append(best)
            joined = best[0] + best[1]
            if joined not in known:
                known.add(joined)
                self.tokens.append(joined)
            changed = set()
            for i in where.pop(best):
                old = words[i]
                new = words[i] = self._merge(old, best, joined)
                for pair in zip(old, old[1:]):
                    pairs[pair] -= counts[i]
                    changed.add(pair)
                for pair in zip(new, new[1:]):
                    pairs[pair] += counts[i]
                    where[pair].add(i)
                    changed.add(pair)
            pairs[best] = 0
            for pair in changed:
                heapq.heappush(heap, (-pairs[pair], pair))

    @staticmethod
    def _merge(word, pair, joined):
        out, i = [], 0
        while i < len(word):
            if i + 1 < len(word) and (word[i], word[i + 1]) == pair:
                out.append(joined)
                i += 2
            else:
                out.append(word[i])
                i += 1
        return out

    def _encode_word(self, word):
        parts = self._split(word)
        while len(parts) > 1:
            rank, pair = min((self.ranks.get(p, 1 << 30), p) for p in zip(parts, parts[1:]))
            if rank == 1 << 30:
                break
            parts = self._merge(parts, pair, pair[0] + pair[1])
        return [self.ids[p] for p in parts]

    def encode(self, text):
        ids = []
        for word in re.findall(self.PATTERN, text):
            if word not in self._cache:
                self._cache[word] = self._encode_word(word)
            ids += self._cache[word]
        return ids

    def tokenizer_json(self):
        split = {"type": "Split", "pattern": {"Regex": self.PATTERN}, "behavior": "Isolated", "invert": False}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                 "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": self.ids,
                 "merges": [" ".join(pair) for pair in self.merges]}
        # lstrip: "oslo <end>" and "oslo<end>" are the same tokens, as in training.
        return document(added_tokens(True), None, {"type": "Sequence", "pretokenizers": [split, level]}, level, model)


def from_tokenizer_json(tokenizer):
    model = tokenizer["model"]
    return (Words if model["type"] == "WordLevel" else BytePairs).from_model(model)
