// Writes tokenizer_cases.json: small tokenizers of every kind that worker/model/tokenizer.h reads, with the
// ids and the decoded text that the tokenizers library itself gives for awkward texts. The file in this
// directory was made so; tokenizer_test.cc compares our ids and texts with it.
//
// usage (Node.js, in a scratch directory):
//   npm install @anush008/tokenizers && NODE_PATH=node_modules node tokenizer_reference.js > tokenizer_cases.json
'use strict';
const fs = require('fs');
const { Tokenizer } = require('@anush008/tokenizers');

const LLAMA3 = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const QWEN2 = LLAMA3.replace('\\p{N}{1,3}', '\\p{N}');

// ---- byte-level alphabet and a small BPE trainer
const prints = (b) => (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
const symbols = [];
for (let b = 0, next = 256; b < 256; ++b) symbols.push(String.fromCodePoint(prints(b) ? b : next++));
const byteLevel = (text) => [...Buffer.from(text)].map((b) => symbols[b]);

function train(words, alphabet, count) {
  const sequences = words.map((w) => w.slice());
  const merges = [];
  const vocab = alphabet.slice();
  while (merges.length < count) {
    const pairs = new Map();
    for (const s of sequences) {
      for (let i = 0; i + 1 < s.length; ++i) {
        const key = s[i] + '\u0000' + s[i + 1];
        pairs.set(key, (pairs.get(key) || 0) + 1);
      }
    }
    let best = null;
    for (const [key, n] of pairs) if (best === null || n > pairs.get(best) || (n === pairs.get(best) && key < best)) best = key;
    if (best === null || pairs.get(best) < 2) break;
    const [a, b] = best.split('\u0000');
    merges.push([a, b]);
    if (!vocab.includes(a + b)) vocab.push(a + b);
    for (const s of sequences) {
      for (let i = 0; i + 1 < s.length; ++i) if (s[i] === a && s[i + 1] === b) s.splice(i, 2, a + b);
    }
  }
  return { vocab, merges };
}

const corpus = ("The licences for most software are designed to take away your freedom to share and change it. " +
  "By contrast, we don't want this; it's 2024 and they'll say we've 1000000 reasons. int main(int argc, char** argv) {\n" +
  "  return argc > 1 ? 100 : 256;\n}\n\n\nÉcole, naïve café, Straße, Ωmega, привет мир, 你好世界, 世界你好, こんにちは, 한국어 한국, 👍🏽👍🏽 🙂🙂. ").repeat(3) +
  fs.readFileSync('/usr/share/common-licenses/BSD', 'utf8');

const byteWords = corpus.match(/ ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+/gu).map(byteLevel);
const bytes = train(byteWords, symbols, 220);
const pieceWords = corpus.match(/ ?\S+/g).map((w) => [...w.replace(/ /g, '▁')]);
const pieceAlphabet = ['<unk>', '<s>', '</s>'];
for (let b = 0; b < 256; ++b) pieceAlphabet.push('<0x' + b.toString(16).toUpperCase().padStart(2, '0') + '>');
for (const c of new Set([...'▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?()*\'"-é世界'])) pieceAlphabet.push(c);
const inAlphabet = (w) => w.every((c) => pieceAlphabet.includes(c));
const pieces = train(pieceWords.filter(inAlphabet), pieceAlphabet, 200);

const ids = (list) => Object.fromEntries(list.map((t, i) => [t, i]));
const added = (list, first) => list.map(([content, options], i) => Object.assign(
  { id: first + i, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special: true }, options));
const split = (regex) => ({ type: 'Split', pattern: { Regex: regex }, behavior: 'Isolated', invert: false });
const byteLevelStep = (prefix, regex) => ({ type: 'ByteLevel', add_prefix_space: prefix, trim_offsets: true, use_regex: regex });
const template = (token, id) => ({
  type: 'TemplateProcessing',
  single: [{ SpecialToken: { id: token, type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
  pair: [{ Sequence: { id: 'A', type_id: 0 } }, { Sequence: { id: 'B', type_id: 1 } }],
  special_tokens: { [token]: { id: token, ids: [id], tokens: [token] } },
});
const bpe = (trained, options) => Object.assign({
  type: 'BPE', dropout: null, unk_token: null, continuing_subword_prefix: null, end_of_word_suffix: null, fuse_unk: false,
  byte_fallback: false, vocab: ids(trained.vocab), merges: trained.merges.map((m) => m.join(' ')),
}, options);
const document = (parts) => Object.assign({ version: '1.0', truncation: null, padding: null, added_tokens: [], normalizer: null,
  pre_tokenizer: null, post_processor: null, decoder: null }, parts);
const B = bytes.vocab.length, P = pieces.vocab.length;
const sentencepieceDecoder = { type: 'Sequence', decoders: [
  { type: 'Replace', pattern: { String: '▁' }, content: ' ' }, { type: 'ByteFallback' }, { type: 'Fuse' },
  { type: 'Strip', content: ' ', start: 1, stop: 0 }] };
const words = ['<unk>', '<bos>', '<ask>'].concat([...new Set(corpus.toLowerCase().match(/[a-z]+|\d|[^\sa-z\d]/gu))].slice(0, 150));

const tokenizers = {
  llama3: document({
    added_tokens: added([['<|begin_of_text|>'], ['<|eot_id|>'], ['<|python_tag|>']], B),
    pre_tokenizer: { type: 'Sequence', pretokenizers: [split(LLAMA3), byteLevelStep(false, false)] },
    post_processor: { type: 'Sequence', processors: [byteLevelStep(true, false), template('<|begin_of_text|>', B)] },
    decoder: byteLevelStep(true, true),
    model: bpe(bytes, { ignore_merges: true }),
  }),
  qwen2: document({
    added_tokens: added([['<|endoftext|>'], ['<|im_start|>'], ['<|im_end|>']], B),
    normalizer: { type: 'NFC' },
    pre_tokenizer: { type: 'Sequence', pretokenizers: [split(QWEN2), byteLevelStep(false, false)] },
    post_processor: byteLevelStep(false, false),
    decoder: byteLevelStep(false, false),
    model: bpe(bytes, {}),
  }),
  gpt2: document({
    added_tokens: added([['<|endoftext|>'], ['<mask>', { lstrip: true }], ['<right>', { rstrip: true }],
      ['word', { single_word: true, special: false }], ['Normal', { normalized: true, special: false }]], B),
    pre_tokenizer: byteLevelStep(true, true),
    post_processor: byteLevelStep(true, true),
    decoder: byteLevelStep(true, true),
    model: bpe(bytes, {}),
  }),
  digits: document({
    pre_tokenizer: { type: 'Sequence', pretokenizers: [{ type: 'Digits', individual_digits: true },
      { type: 'Punctuation', behavior: 'Contiguous' }, byteLevelStep(false, true)] },
    decoder: byteLevelStep(false, true),
    model: bpe(bytes, {}),
  }),
  llama2: document({
    added_tokens: added([['<unk>'], ['<s>'], ['</s>']], 0),
    normalizer: { type: 'Sequence', normalizers: [{ type: 'Prepend', prepend: '▁' },
      { type: 'Replace', pattern: { String: ' ' }, content: '▁' }] },
    post_processor: template('<s>', 1),
    decoder: sentencepieceDecoder,
    model: bpe(pieces, { unk_token: '<unk>', fuse_unk: true, byte_fallback: true }),
  }),
  mistral: document({
    added_tokens: added([['<unk>'], ['<s>'], ['</s>']], 0),
    pre_tokenizer: { type: 'Metaspace', replacement: '▁', add_prefix_space: true, prepend_scheme: 'first', split: false },
    post_processor: template('<s>', 1),
    decoder: sentencepieceDecoder,
    model: bpe(pieces, { unk_token: '<unk>', fuse_unk: true, byte_fallback: true }),
  }),
  metaspace: document({
    pre_tokenizer: { type: 'Metaspace', replacement: '▁', add_prefix_space: true, prepend_scheme: 'always', split: true },
    decoder: { type: 'Metaspace', replacement: '▁', add_prefix_space: true, prepend_scheme: 'always', split: true },
    model: bpe(pieces, { unk_token: '<unk>', fuse_unk: false }),
  }),
  words: document({
    added_tokens: added([['<unk>'], ['<bos>'], ['<ask>']], 0),
    normalizer: { type: 'Lowercase' },
    pre_tokenizer: { type: 'Sequence', pretokenizers: [{ type: 'WhitespaceSplit' }, split('[a-z]+|\\d|[^\\sa-z\\d]')] },
    model: { type: 'WordLevel', vocab: ids(words), unk_token: '<unk>' },
  }),
  whitespace: document({
    normalizer: { type: 'Sequence', normalizers: [{ type: 'Strip', strip_left: true, strip_right: false },
      { type: 'Replace', pattern: { Regex: '\\d+' }, content: '1' }, { type: 'Lowercase' }] },
    pre_tokenizer: { type: 'Whitespace' },
    model: { type: 'WordLevel', vocab: ids(words), unk_token: '<unk>' },
  }),
};
for (const [behavior, invert] of [['Removed', false], ['MergedWithPrevious', false], ['MergedWithNext', false],
  ['Contiguous', false], ['MergedWithPrevious', true], ['MergedWithNext', true], ['Removed', true]]) {
  tokenizers['split' + behavior + (invert ? 'Inverted' : '')] = document({
    pre_tokenizer: { type: 'Sequence', pretokenizers: [
      { type: 'Split', pattern: { Regex: '[,;. ]' }, behavior, invert }, byteLevelStep(false, false)] },
    decoder: byteLevelStep(false, false),
    model: bpe(bytes, {}),
  });
}

const texts = [
  '', ' ', '  ', 'a', ' a', 'Hello world', "I'LL pay 12345 €, ok?\n\n  done", "can't 'tis O'Reilly we'Ve THEY'RE", "1st 3.14 1000000 ٣٤ x² Ⅷ 12 345 6",
  'a\n b\r\n\r\nc \n\n\n  d   \n  x', '\t\tcode\t= 1;\n\tif (x) {\n\t\treturn;  }  ', 'a\u00a0b\u2003c\u3000d \u200be', '你好世界abc你好，世界。', 'こんにちは 世界 한국어 한국!',
  'hi👍🏽! 🙂🙂 👨‍👩‍👧 🏳️‍🌈', 'École naïve café Straße ΩMEGA ПРИВЕТ мир', 'cafe\u0301 A\u030a \u1e9b\u0323 \u212b ﬁ', '_foo foo_bar __init__ (a+b)*c!!??...\n', 'word sword words word. wörd-word word',
  '<|begin_of_text|>Hi<|eot_id|> there <|im_start|>user\n<|im_end|><|endoftext|>', 'a  <mask>  b <right>   c<mask><right> d', '<s>hi</s> hi <unk>  <s> ', '<0x41> ▁x▁ ▁▁', 'Normal normal <BOS> <bos>the the',
  '\u0000\u0001\u007f\u0080\u00ad\ufeff\ufffd', 'x'.repeat(70), 'the '.repeat(20), ' '.repeat(40) + 'end' + '\n'.repeat(9), 'freedom, to; share. and , ; . change.,; it',
  'int main(int argc, char** argv) {\n  return argc > 1 ? 100 : 256;\n}\n', 'İstanbul ΣΑΣ ǅ', corpus.slice(0, 400),
];

(async () => {
  const out = {};
  for (const [name, tokenizer] of Object.entries(tokenizers)) {
    const library = Tokenizer.fromString(JSON.stringify(tokenizer));
    const cases = [];
    for (const text of texts) {
      const plain = (await library.encode(text, null, { addSpecialTokens: false })).getIds();
      const special = (await library.encode(text, null, { addSpecialTokens: true })).getIds();
      cases.push({ text, ids: plain, special: special.length - plain.length, first: special.slice(0, special.length - plain.length),
        kept: await library.decode(plain, false), skipped: await library.decode(plain, true) });
    }
    out[name] = { tokenizer, cases };
  }
  // Vocabularies are shared: a model's "vocab" and "merges" name the list they stand for.
  const shared = { bytes: { vocab: ids(bytes.vocab), merges: bpe(bytes).merges }, pieces: { vocab: ids(pieces.vocab), merges: bpe(pieces).merges } };
  for (const { tokenizer } of Object.values(out)) {
    for (const [name, { vocab }] of Object.entries(shared)) {
      if (JSON.stringify(tokenizer.model.vocab) !== JSON.stringify(vocab)) continue;
      tokenizer.model.vocab = tokenizer.model.merges = name;
    }
  }
  console.log('{"shared": ' + JSON.stringify(shared) + ',\n"tokenizers": {');
  console.log(Object.entries(out).map(([name, value]) =>
    JSON.stringify(name) + ': {"tokenizer":\n' + JSON.stringify(value.tokenizer) + ',\n"cases": [\n' +
    value.cases.map((c) => JSON.stringify(c)).join(',\n') + ']}').join(',\n'));
  console.log('}}');
})();
