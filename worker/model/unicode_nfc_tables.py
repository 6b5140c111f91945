#!/usr/bin/env python3
"""Writes unicode_nfc_tables.cc from the Unicode data that Python carries.

usage: python3 worker/model/unicode_nfc_tables.py > worker/model/unicode_nfc_tables.cc

Hangul syllables are left out: unicode_nfc.cc computes them.
"""
import sys
import unicodedata

HANGUL = range(0xAC00, 0xD7A4)


def rows(table):
    line = "   "
    for row in table:
        cell = " " + ",".join(map(str, row)) + ","
        if len(line) + len(cell) > 100:
            print(line)
            line = "   "
        line += cell
    print(line)


def main():
    composing, only_decomposing, classes = [], [], []
    for code in range(sys.maxunicode + 1):
        char = chr(code)
        if 0xD800 <= code <= 0xDFFF or code in HANGUL:
            continue
        combining = unicodedata.combining(char)
        if combining:
            if classes and classes[-1][1] == code - 1 and classes[-1][2] == combining:
                classes[-1][1] = code
            else:
                classes.append([code, code, combining])
        mapping = unicodedata.decomposition(char)
        if not mapping or mapping.startswith("<"):
            continue
        parts = [int(part, 16) for part in mapping.split()]
        parts += [0] * (2 - len(parts))
        stays = unicodedata.normalize("NFC", char) == char
        (composing if stays else only_decomposing).append([code] + parts)
    print("// Written by unicode_nfc_tables.py from Unicode %s; do not edit." % unicodedata.unidata_version)
    print('#include "worker/model/unicode_nfc.h"\n')
    print("// clang-format off")
    print("namespace icecache::nfc {\n")
    print("// Character, first and second of its canonical decomposition; pairs that compose again.")
    print("const uint32_t kComposing[] = {")
    rows(composing)
    print("};\nconst size_t kComposingCount = %d;\n" % len(composing))
    print("// Those that do not compose again; second is 0 for a single character.")
    print("const uint32_t kOnlyDecomposing[] = {")
    rows(only_decomposing)
    print("};\nconst size_t kOnlyDecomposingCount = %d;\n" % len(only_decomposing))
    print("// First and last of a range, its canonical combining class.")
    print("const uint32_t kClasses[] = {")
    rows(classes)
    print("};\nconst size_t kClassesCount = %d;\n" % len(classes))
    print("}  // namespace icecache::nfc\n// clang-format on")


main()
