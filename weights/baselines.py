"""What a reader may compare bits per byte with: gzip, xz, and a 5-gram of the same tokens.

    python -m weights.baselines --corpus DIR --model MODEL_DIR [--json FILE]

Compressors get the training text first where their window reaches (xz: all of it; gzip's are
32 kB), and are charged for what the held-out text adds. The 5-gram is interpolated (Witten & Bell
1991, method C), trained on every token of the training text once.
"""

from __future__ import annotations

import argparse
import json
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.frontend.tokenizer import Tokenizer
from weights.corpus.sources import read_documents
from weights.corpus.tokens import Tokens, encode_documents

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
ORDER = 5


def gzip_size(data: bytes) -> int:
    """Bytes at the highest level."""
    return len(zlib.compress(data, 9))


def xz_size(data: bytes) -> int:
    """Bytes with a dictionary that holds all of the data (at most 1.5 GiB)."""
    size = min(max(len(data), 1 << 16), 1536 << 20)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": size}]
    return len(lzma.compress(data, lzma.FORMAT_XZ, filters=filters))


def added_bits_per_byte(size: Callable[[bytes], int], before: bytes, text: bytes) -> float:
    """Bits that each byte of text adds to what was compressed before it."""
    return 8 * (size(before + text) - size(before)) / len(text)


class NGram:
    """An interpolated n-gram over token ids.

    p_n(w | h) = (c(h w) + t(h) p_{n-1}(w | h')) / (c(h) + t(h)), h' being h without its first
    token, t(h) the number of different tokens seen after h; p_0 is uniform. So a context that was
    never seen leaves everything to the shorter one (Witten & Bell 1991, IEEE Trans. Inf. Theory
    37(4); the form of Chen & Goodman 1998).
    """

    def __init__(self, tokens: Tokens, vocab_size: int, order: int = ORDER) -> None:
        """tokens: the training text in a row."""
        self.vocab_size = vocab_size
        self.order = order
        ids = tokens.astype(np.int64)
        # Each n-gram is named by its prefix's number and its last token, so that a name stays
        # below (number of tokens) x (vocabulary), whatever n is.
        self.grams: list[Ids] = []  # names, sorted, by n - 1
        self.counts: list[Ids] = []
        self.prefix_counts: list[Ids] = []  # of a prefix: occurrences, by the prefix's number
        self.followers: list[Ids] = []  # of a prefix: different tokens after it
        prefixes = np.zeros(len(ids), dtype=np.int64)  # number of the (n-1)-gram before a token
        prefix_total = 1
        for n in range(1, order + 1):
            valid = np.arange(len(ids)) >= n - 1
            names = prefixes[valid] * vocab_size + ids[valid]
            grams, number, counts = np.unique(names, return_inverse=True, return_counts=True)
            owner = grams // vocab_size
            self.grams.append(grams)
            self.counts.append(counts)
            self.followers.append(np.bincount(owner, minlength=prefix_total))
            totals = np.bincount(owner, weights=counts, minlength=prefix_total)
            self.prefix_counts.append(totals.astype(np.int64))
            # the n-gram that ends at token i - 1 is the prefix of the (n+1)-gram that ends at i
            prefixes = np.zeros(len(ids), dtype=np.int64)
            prefixes[np.flatnonzero(valid)[:-1] + 1] = number[:-1]
            prefix_total = len(grams)

    def _number(self, n: int, prefix: Ids, token: Ids) -> Ids:
        """Numbers of n-grams, -1 for those never seen; prefix: numbers of (n-1)-grams, or -1."""
        names = prefix * self.vocab_size + token
        grams = self.grams[n - 1]
        place = np.minimum(np.searchsorted(grams, names), len(grams) - 1)
        return np.where((prefix >= 0) & (grams[place] == names), place, -1)

    def probabilities(self, tokens: Tokens) -> Floats:
        """p of each token but the first, given up to order - 1 before it; float64 [tokens - 1]."""
        ids = tokens.astype(np.int64)
        count = len(ids) - 1
        p: Floats = np.full(count, 1 / self.vocab_size)
        targets = ids[1:]
        for n in range(1, self.order + 1):
            # number of the (n-1)-gram that ends before the target; short histories have none
            prefix: Ids = np.zeros(count, dtype=np.int64)
            for k in range(1, n):
                back = n - k  # how far before the target the prefix's k-th token stands
                token = np.full(count, -1, dtype=np.int64)
                token[back - 1 :] = ids[: count - back + 1]
                prefix = np.where(token >= 0, self._number(k, prefix, np.maximum(token, 0)), -1)
            number = self._number(n, prefix, targets)
            seen = np.where(number >= 0, self.counts[n - 1][np.maximum(number, 0)], 0)
            known = np.maximum(prefix, 0)
            total, kinds = self.prefix_counts[n - 1][known], self.followers[n - 1][known]
            mixed = (seen + kinds * p) / (total + kinds)
            p = np.where(prefix >= 0, mixed, p)
        return p


def measure(corpus: Path, model_dir: Path) -> dict[str, dict[str, float]]:
    """Bits per byte by held-out source and baseline."""
    tokenizer = Tokenizer.from_directory(model_dir)
    documents = {p.stem: read_documents(p) for p in sorted((corpus / "train").glob("*.jsonl"))}
    before = "\n\n".join(text for texts in documents.values() for text in texts).encode()
    training = np.concatenate([encode_documents(tokenizer, d) for d in documents.values()])
    gram = NGram(training, len(tokenizer))
    results: dict[str, dict[str, float]] = {}
    for path in sorted((corpus / "heldout").glob("*.jsonl")):
        texts = read_documents(path)
        text = "\n\n".join(texts).encode()
        size = sum(len(document.encode()) for document in texts)
        bits = -np.log2(gram.probabilities(encode_documents(tokenizer, texts))).sum()
        results[path.stem] = {
            "gzip": added_bits_per_byte(gzip_size, before[-(1 << 15) :], text),
            "xz": added_bits_per_byte(xz_size, before, text),
            "5-gram": float(bits) / size,
        }
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m weights.baselines", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--corpus", type=Path, required=True, help="what weights.corpus wrote")
    parser.add_argument("--model", type=Path, required=True, help="directory of the tokenizer")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    results = measure(options.corpus, options.model)
    for source, figures in results.items():
        print(source, *(f"{name} {bits:.3f}" for name, bits in figures.items()), sep="  ")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
