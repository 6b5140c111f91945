"""Real English that Debian packages install: licences, Perl manual pages, package documentation."""
import glob
import gzip
import os
import random

PATTERNS = (
    "/usr/share/common-licenses/*",
    "/usr/share/perl/5*/pod/*.pod",
    "/usr/share/perl/5*/**/*.pod",
    "/usr/share/doc/**/README*",
    "/usr/share/doc/**/*.txt*",
    "/usr/share/doc/**/copyright",
    "/usr/share/doc/**/*.md*",
)
BYTES_MIN = 300_000


def read_file(path):
    """The text of a plain or gzipped file; empty when it is binary or cannot be read."""
    try:
        opener = gzip.open if path.endswith(".gz") else open
        with opener(path, "rb") as file:
            data = file.read(2_000_000)
    except (OSError, EOFError):
        return ""
    if b"\0" in data:
        return ""
    return data.decode("utf-8", errors="ignore")


def read_text(bytes_max, seed):
    """A list of documents, together at most bytes_max; the same on every run of one machine."""
    seen, documents, total = set(), [], 0
    paths = sorted({os.path.realpath(p) for pattern in PATTERNS for p in glob.glob(pattern, recursive=True)})
    random.Random(seed).shuffle(paths)
    for path in paths:
        if total >= bytes_max or not os.path.isfile(path):
            continue
        text = read_file(path)
        if len(text) < 200 or hash(text) in seen:  # licences are repeated in many packages
            continue
        seen.add(hash(text))
        documents.append(text)
        total += len(text)
    if total < BYTES_MIN:
        raise SystemExit("found %d bytes of text under /usr/share, expected %d: install perl-doc or other "
                         "packages with documentation" % (total, BYTES_MIN))
    return documents
