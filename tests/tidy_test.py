#!/usr/bin/env python3
"""Checks the rules of the house that a compiler does not: who may include whom, how long things are, what is
commented, and that ARCHITECTURE.md tells the truth about folders. CONTRIBUTING.md lists the rules.

Each rule is a function from a file to findings; the first test class shows that each can fail, the second that
nothing in this tree does. Run alone: python3 tests/tidy_test.py
"""
import os
import pathlib
import re
import subprocess
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEADER_LINES, SOURCE_LINES, FUNCTION_LINES, COLUMNS = 200, 500, 70, 100
SOURCES = ('.cc', '.cu', '.c')
# Folders in which no line is longer than COLUMNS. Elsewhere comments are that clang-format does not break.
NARROW = ('tests/chaos/', 'tests/fuzz/')
HEADERS = ('.h', '.cuh')

# A file may include project headers of its own layer and of those listed. The longest matching prefix decides.
LAYERS = {
    'common': ['common'],
    'kernels': ['kernels', 'common'],
    'cacheserver/select': ['cacheserver/select', 'kernels', 'common'],
    'cacheserver/store': ['cacheserver/store', 'kernels', 'common'],
    'cacheserver/context': ['cacheserver/context', 'cacheserver/select', 'cacheserver/store', 'kernels', 'common'],
    'cacheserver/ctl': ['cacheserver/ctl', 'kernels', 'common'],
    'cacheserver': ['cacheserver', 'kernels', 'common'],
    'worker/model': ['worker/model', 'kernels', 'common'],
    'worker': ['worker', 'kernels', 'common'],
    'tests': ['tests', 'worker', 'cacheserver', 'kernels', 'common'],
}

# A third-party header appears in these files only; foreign errors become Status there.
BORDERS = [
    (r'uc[pst]/', [r'common/ucx_\w+\.(cc|h)']),
    (r'(capnp|kj)/|wire/\w+\.capnp\.h', [r'common/wire/\w+_codec\.cc', r'common/wire/capnp_\w+\.h']),
    (r'(spdlog|fmt)/', [r'common/log\.cc']),
    (r'CLI/', [r'common/config\.cc']),
    (r'toml', [r'common/config_file\.cc']),
    (r'rocksdb/', [r'cacheserver/store/rocks_\w+\.cc']),
    (r'hwy/', [r'kernels/\w+\.cc', r'kernels/\w+-inl\.h']),
    (r'boost/beast', [r'cacheserver/admin\w*\.cc', r'worker/serve/openai\w*\.cc', r'.*_test\.cc', r'tests/.*\.cc']),
    (r'boost/asio/ssl', [r'common/control_stream\.cc']),
    (r'boost/', [r'.*\.cc', r'cacheserver/listen\.h', r'common/control_stream\.h']),
    (r'(cblas|openblas)', [r'worker/model/gemm\.cc']),
    (r'pcre2', [r'worker/model/pretokenizer\.cc']),
    (r'utf8proc', [r'worker/model/unicode\.cc']),
    (r'xxhash', [r'common/checksum\.cc']),
    (r'openssl/', [r'common/prefix_key\.cc', r'cacheserver/(\w+/)*\w+\.cc', r'tests/support/\w+\.cc']),
    (r'nlohmann/', [r'.*\.cc']),
    (r'(cuda|cub/|cooperative_groups)', [r'.*\.cuh?', r'\w+(/\w+)*cuda\w*\.(cc|h)']),
    (r'(gtest|gmock)/', [r'.*_test\.(cc|cu)', r'.*_(suite|samples|slice)\.h', r'(.*/)?test_\w+\.h', r'tests/.*']),
]

# Headers for tests may stand beside the code they help to test.
TEST_ONLY = re.compile(r'.*_test\.(cc|cu)|(.*/)?test_\w+\.h|.*_(suite|samples|slice)\.h|tests/.*')

INCLUDE = re.compile(r'^\s*#\s*include\s+([<"])([^>"]+)[>"]')


def layer_of(path):
    return max((p for p in LAYERS if path.startswith(p + '/')), key=len, default=None)


def check_includes(path, text):
    layer = layer_of(path)
    findings = []
    for number, line in enumerate(text.splitlines(), 1):
        match = INCLUDE.match(line)
        if not match:
            continue
        quote, target = match.groups()
        for pattern, files in BORDERS:
            if re.match(pattern, target):
                if not any(re.fullmatch(f, path) for f in files):
                    findings.append((number, f'{target} belongs behind {" or ".join(files)}'))
                break
        owner = layer_of(target)
        if quote == '<' or owner is None or layer is None:
            continue
        allowed = LAYERS[layer]
        if TEST_ONLY.fullmatch(path):
            allowed = allowed + ['tests']
        if not any(owner == a or owner.startswith(a + '/') for a in allowed):
            findings.append((number, f'{layer} does not include {owner} ({target})'))
    return findings


def check_length(path, text):
    # Templates that must be seen whole, such as bodies of kernels, are sources in all but name: x-inl.h.
    limit = HEADER_LINES if path.endswith(HEADERS) and not path.endswith('-inl.h') else SOURCE_LINES
    lines = text.count('\n')
    return [(lines, f'{lines} lines, more than {limit}')] if lines > limit else []


def code_only(text):
    """The text with comments, strings, character literals and preprocessor lines blanked; newlines stay."""
    pattern = re.compile(
        r'//[^\n]*|/\*.*?\*/|R"([^(\s]*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|(?<![0-9a-zA-Z_])\'(?:\\.|[^\'\\\n])+\'', re.S)
    text = pattern.sub(lambda m: re.sub(r'[^\n]', ' ', m.group()), text)
    return re.sub(r'^[ \t]*#(?:[^\n\\]|\\.|\\\n)*', lambda m: re.sub(r'[^\n]', ' ', m.group()), text, flags=re.M)


def functions(text):
    """(first line, last line) of every outermost function body, by counting braces."""
    code = code_only(text)
    found, scopes, head_start = [], [], 0
    for at, char in enumerate(code):
        if char == '{':
            head = re.sub(r'\b(public|private|protected):', lambda m: ' ' * len(m.group()), code[head_start:at])
            if any(kind == 'function' for kind, _ in scopes):
                kind = 'inner'
            elif re.search(r'\b(namespace|extern)\b', head):
                kind = 'namespace'
            elif '(' not in head or re.search(r'\b(class|struct|union|enum)\b[^()=]*$', head):
                kind = 'type'
            else:
                kind = 'value' if re.search(r'=\s*$', head) else 'function'
            if kind == 'function':
                start = head_start + len(head) - len(head.lstrip())
                found.append([code.count('\n', 0, start) + 1, None])
            scopes.append((kind, head_start))
            head_start = at + 1
        elif char == '}' and scopes:
            kind, started = scopes.pop()
            head_start = at + 1
            if kind != 'function':
                continue
            if code[at + 1:at + 200].lstrip()[:1] in (',', '{'):  # a member's braces: S() : a_{1}, b_{2} {
                found.pop()
                head_start = started
            else:
                found[-1][1] = code.count('\n', 0, at) + 1
        elif char == ';' and not any(kind == 'function' for kind, _ in scopes):
            head_start = at + 1
    return [(first, last) for first, last in found if last]


def check_function_length(path, text):
    del path
    return [(first, f'function of {last - first + 1} lines, more than {FUNCTION_LINES}')
            for first, last in functions(text) if last - first + 1 > FUNCTION_LINES]


def check_columns(path, text):
    if not path.startswith(NARROW):
        return []
    return [(n, f'{len(line)} columns, more than {COLUMNS}') for n, line in enumerate(text.splitlines(), 1)
            if len(line) > COLUMNS]


def check_todo(path, text):
    del path
    return [(n, 'TODO(now): do it before it is merged') for n, line in enumerate(text.splitlines(), 1)
            if 'TODO(' + 'now)' in line]


def check_header_comment(path, text):
    if not path.endswith(HEADERS):
        return []
    findings = [] if text.startswith('//') else [(1, 'a header starts with a comment: what it is, owner, thread')]
    # HWY_TARGET_TOGGLE guards what Highway includes once per instruction set.
    if '#pragma once' not in text and 'HWY_TARGET_TOGGLE' not in text:
        findings.append((1, '#pragma once is missing'))
    return findings


def check_class_comments(path, text):
    """The first class of a header is what its first comment is about; others have their own, or are named there."""
    if not path.endswith(HEADERS):
        return []
    lines = text.splitlines()
    top = ' '.join(line for line in text.split('\n#', 1)[0].splitlines() if line.startswith('//'))
    findings, first = [], True
    for index, line in enumerate(lines):
        match = re.match(r'class (?:\[\[\w+\]\] )?(\w+)(?: final)?(?:\s*[:{].*)?$', line)
        if not match or line.rstrip().endswith(';'):
            continue
        above = index - 1
        while above >= 0 and lines[above].startswith('template'):
            above -= 1
        commented = above >= 0 and lines[above].lstrip().startswith('//')
        if not (commented or (first and top) or re.search(rf'\b{match.group(1)}s?\b', top, re.I)):
            findings.append((index + 1, f'class {match.group(1)} has no comment'))
        first = False
    return findings


RULES = [check_includes, check_length, check_function_length, check_columns, check_todo, check_header_comment, check_class_comments]


def tracked_files():
    """Files under version control, and in a source archive without .git all but build trees."""
    git = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, check=False)
    if git.returncode == 0 and git.stdout:
        return sorted(f for f in git.stdout.decode().split('\0') if f and (ROOT / f).is_file())
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in ('build', '.cache', '__pycache__')]
        found += [str((pathlib.Path(folder) / f).relative_to(ROOT)) for f in files]
    return sorted(found)


def folders_of(files, depth=2):
    """Folders with files in them, to this depth: what a reader sees first."""
    folders = set()
    for file in files:
        parts = file.split('/')[:-1]
        folders |= {'/'.join(parts[:n]) for n in range(1, min(len(parts), depth) + 1)}
    return folders


def folders_in_map(text):
    block = re.search(r'^```folders\n(.*?)^```', text, re.S | re.M)
    return {line.split()[0].rstrip('/') for line in block.group(1).splitlines() if line and line[0] not in ' #'} \
        if block else set()


class EachRuleCanFail(unittest.TestCase):
    def findings(self, rule, path, text):
        return [message for _, message in rule(path, text)]

    def test_layers(self):
        def count(path, target):
            return len(check_includes(path, f'#include "{target}"\n'))
        self.assertEqual(count('common/a.cc', 'kernels/b.h'), 1)
        self.assertEqual(count('kernels/a.cc', 'common/b.h'), 0)
        self.assertEqual(count('kernels/a.cc', 'cacheserver/select/b.h'), 1)
        self.assertEqual(count('worker/a.cc', 'cacheserver/b.h'), 1)
        self.assertEqual(count('cacheserver/a.cc', 'worker/model/b.h'), 1)
        self.assertEqual(count('worker/a.cc', 'worker/model/b.h'), 0)
        self.assertEqual(count('worker/serve/a.cc', 'worker/model/b.h'), 0)
        self.assertEqual(count('worker/model/a.cc', 'worker/b.h'), 1)
        self.assertEqual(count('cacheserver/select/a.cc', 'cacheserver/store/b.h'), 1)
        self.assertEqual(count('cacheserver/store/a.cc', 'cacheserver/select/b.h'), 1)
        self.assertEqual(count('cacheserver/context/a.cc', 'cacheserver/store/b.h'), 0)
        self.assertEqual(count('cacheserver/context/a.cc', 'cacheserver/shard.h'), 1)
        self.assertEqual(count('cacheserver/a.cc', 'cacheserver/store/b.h'), 0)
        self.assertEqual(count('cacheserver/ctl/a.cc', 'cacheserver/shard.h'), 1)
        self.assertEqual(count('worker/a.cc', 'tests/support/b.h'), 1)
        self.assertEqual(count('worker/a_test.cc', 'tests/support/b.h'), 0)
        self.assertEqual(count('tests/a.cc', 'cacheserver/store/b.h'), 0)

    def test_borders(self):
        self.assertTrue(check_includes('common/channel.cc', '#include <ucp/api/ucp.h>\n'))
        self.assertFalse(check_includes('common/ucx_transport.cc', '#include <ucp/api/ucp.h>\n'))
        self.assertTrue(check_includes('worker/a.h', '#include <nlohmann/json.hpp>\n'))
        self.assertTrue(check_includes('common/wire/data_codec.h', '#include "wire/data.capnp.h"\n'))
        self.assertFalse(check_includes('common/wire/data_codec.cc', '#include "wire/data.capnp.h"\n'))
        self.assertTrue(check_includes('cacheserver/shard.cc', '#include <rocksdb/db.h>\n'))

    def test_lengths(self):
        self.assertTrue(check_length('a.h', 'x\n' * 201))
        self.assertFalse(check_length('a.h', 'x\n' * 200))
        self.assertFalse(check_length('a-inl.h', 'x\n' * 201))
        self.assertTrue(check_length('a-inl.h', 'x\n' * 501))
        self.assertTrue(check_length('a.cc', 'x\n' * 501))
        body = 'int F(int a) {\n' + '  a = "}{" + \'{\';  // }\n' * 69 + '}\n'
        self.assertTrue(check_function_length('a.cc', 'namespace x {\nstruct S {\n' + body + '};\n}\n'))
        self.assertFalse(check_function_length('a.cc', body.replace('  a =', '', 1).replace('\n', '', 1)))

    def test_columns(self):
        self.assertTrue(check_columns('tests/fuzz/a.cc', '\n' + 'x' * 101))
        self.assertFalse(check_columns('tests/fuzz/a.cc', 'x' * 100))

    def test_functions_are_found_where_they_begin_and_end(self):
        text = ('namespace a {\n' 'class B : public C {\n' ' public:\n' '  B() : x_{1} {}\n' '  int f() const {\n'
                '    if (x) { return 1; }\n' '    return [] { return 2; }();\n' '  }\n' '  int x_ = 0;\n' '};\n'
                'const int kTable[] = {1, 2};\n' 'TEST(A, B) {\n' '}\n' '}\n')
        self.assertEqual(functions(text), [(4, 4), (5, 8), (12, 13)])

    def test_comments(self):
        self.assertTrue(check_header_comment('a.h', '#pragma once\n'))
        self.assertTrue(check_header_comment('a.h', '// A.\n'))
        self.assertFalse(check_header_comment('a.h', '// A.\n#pragma once\n'))
        self.assertFalse(check_header_comment('a.h', '// A.\n#if defined(A_H) == defined(HWY_TARGET_TOGGLE)\n'))
        one, two = '#pragma once\n\nclass Page {\n};\n', 'class [[nodiscard]] Frame final : X {\n};\nclass Y;\n'
        self.assertTrue(check_class_comments('a.h', one))
        self.assertFalse(check_class_comments('a.h', '// A thing.\n' + one))
        self.assertTrue(check_class_comments('a.h', '// A thing.\n' + one + two))
        self.assertFalse(check_class_comments('a.h', '// A thing, and its frames.\n' + one + two))
        self.assertFalse(check_class_comments('a.h', '// A thing.\n' + one + '// Its place.\n' + two))
        self.assertTrue(check_todo('a.cc', '// TODO(' + 'now): x\n'))
        self.assertFalse(check_todo('a.cc', '// TODO(soon): x\n'))

    def test_folder_map(self):
        self.assertEqual(folders_of(['a/b/c/d.cc', 'e.md', 'f/g.cc']), {'a', 'a/b', 'f'})
        self.assertEqual(folders_in_map('x\n```folders\na/      text\na/b/    text\n        more\n```\n'), {'a', 'a/b'})
        self.assertEqual(folders_in_map('none'), set())


class TheTree(unittest.TestCase):
    files = tracked_files()

    def test_keeps_every_rule(self):
        problems, checked = [], 0
        for file in self.files:
            if not file.endswith(SOURCES + HEADERS):
                continue
            checked += 1
            text = (ROOT / file).read_text(encoding='utf-8')
            problems += [f'{file}:{line}: {message}' for rule in RULES for line, message in rule(file, text)]
        self.assertGreater(checked, 20, 'the sources were not found')
        if problems:
            self.fail(f'{len(problems)} findings\n' + '\n'.join(problems))

    def test_architecture_map_is_true(self):
        mapped = folders_in_map((ROOT / 'ARCHITECTURE.md').read_text(encoding='utf-8'))
        there = folders_of(self.files)
        self.assertEqual(sorted(there - mapped), [], 'folders missing from ARCHITECTURE.md')
        self.assertEqual(sorted(mapped - there), [], 'folders in ARCHITECTURE.md that do not exist')


if __name__ == '__main__':
    unittest.main()
