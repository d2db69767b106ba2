"""A second implementation of "philox4x32-10.v1", written from its definition one position at a time, in Python integers
and numpy float32 scalars.  It shares no code with the package, so that a mistake there cannot hide here.

    python tests/independent.py         writes tests/known_answers.json anew
"""

import functools
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
KNOWN_ANSWERS = HERE / "known_answers.json"
DIAGONAL, SIGNS, PERMUTATION = 0, 1, 2
F = np.float32


def normal_table() -> list[int]:
    """32 bit patterns A, then 32 B, from the file that the kernels include."""
    text = re.sub("//.*", "", (HERE.parent / "csrc/core/normal_table.inc").read_text())
    return [int(bits, 16) for bits in re.findall("0x[0-9a-f]{8}", text)]


A, B = np.array(normal_table(), dtype=np.uint32).view(F).reshape(2, 32)


# --- the generator


def philox4x32_10(key: tuple, counter: tuple) -> tuple:
    k0, k1 = key
    x0, x1, x2, x3 = counter
    for _ in range(10):
        hi0, lo0 = divmod(0xD2511F53 * x0, 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = hi1 ^ x1 ^ k0, lo1, hi0 ^ x3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x0, x1, x2, x3


def stream_id(name: str, label: str = "") -> int:
    text = name + "\0" + label if label else name
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


@functools.lru_cache(maxsize=4096)
def call(seed: int, stream: int, purpose: int, block: int, chunk: int, position: int) -> tuple:
    key = (seed % 2**32, seed // 2**32)
    counter = (block + purpose * 2**28, position + chunk * 2**16, stream % 2**32, stream // 2**32)
    assert max(counter) < 2**32
    return philox4x32_10(key, counter)


@functools.cache
def normal(half: int) -> np.float32:
    y = np.array([0x4B000001 | half], dtype=np.uint32).view(F)[0] - F(8421376.0)
    v = F(32928.0) - abs(y)
    s = int(v.view(np.uint32)) >> 21 & 31
    product = B[s] * v
    line = A[s] + product
    return y * line


def gaussian_at(seed: int, stream: int, block: int, chunk: int, n: int, k: int) -> np.float32:
    q = n.bit_length() - 1
    s = min(4, q - 3)
    slot = (k >> s) & 7
    position = (k & (2**s - 1)) | ((k >> (s + 3)) << s)
    word = call(seed, stream, DIAGONAL, block, chunk, position)[slot // 2]
    return normal(word // 65536 if slot % 2 else word % 65536)


def sign_at(seed: int, stream: int, purpose: int, block: int, chunk: int, k: int) -> np.float32:
    position = (k & 3) | ((k >> 9) << 2)
    b = (k >> 2) & 127
    word = call(seed, stream, purpose, block, chunk, position)[b >> 5]
    return F(-1) if (word >> (b & 31)) & 1 else F(1)


def permute(seed: int, stream: int, chunk: int, n: int, k: int) -> int:
    q = n.bit_length() - 1
    low_bits = q // 2
    high_bits = q - low_bits
    keys = call(seed, stream, PERMUTATION, 0, chunk, 0) + call(seed, stream, PERMUTATION, 0, chunk, 1)[:2]

    def mix(x: int, key: int) -> int:
        x = ((x ^ key) * 0x9E3779B1) % 2**32
        return ((x ^ (x >> 15)) * 0x85EBCA77) % 2**32

    low, high = k % 2**low_bits, k >> low_bits
    for r in (0, 2, 4):
        high ^= mix(low, keys[r]) >> (32 - high_bits)
        low ^= mix(high, keys[r + 1]) >> (32 - low_bits)
    return (high << low_bits) | low


def gaussian(seed, stream, block, chunk, n) -> np.ndarray:
    return np.array([gaussian_at(seed, stream, block, chunk, n, k) for k in range(n)], dtype=F)


def signs(seed, stream, purpose, block, chunk, n) -> np.ndarray:
    return np.array([sign_at(seed, stream, purpose, block, chunk, k) for k in range(n)], dtype=F)


def permutation(seed, stream, chunk, n) -> np.ndarray:
    return np.array([permute(seed, stream, chunk, n, k) for k in range(n)], dtype=np.uint32)


# --- the projection, in float32 and in the order of operations that is the contract


def walsh_hadamard(x: np.ndarray, transposed: bool = False) -> np.ndarray:
    x, k = x.copy(), np.arange(len(x))
    order = [*range(2, len(x).bit_length() - 1), 0, 1]
    for bit in reversed(order) if transposed else order:
        a = k[(k >> bit) % 2 == 0]
        b = a + 2**bit
        x[a], x[b] = x[a] + x[b], x[a] - x[b]
    return x


class Model:
    """A whole plan: every tensor one segment, normalised by itself."""

    def __init__(self, shapes: dict, dim: int, seed: int, width: int, diagonal: str, one_chunk: bool = False):
        self.shapes, self.dim, self.seed, self.n, self.diagonal = shapes, dim, seed, width, diagonal
        self.chunks = -(-dim // width)
        self.one_chunk = one_chunk

    def scale(self, name: str) -> np.float32:
        return F((math.sqrt(self.chunks) if self.one_chunk else 1) / math.sqrt(self.n * math.prod(self.shapes[name])))

    def chunks_of(self, name: str, block: int) -> list:
        if self.one_chunk:
            return [(stream_id(name) % self.chunks + block) % self.chunks]
        return list(range(self.chunks))

    def length(self) -> int:
        """Of the chunks of theta."""
        return -(-self.dim // self.chunks) if self.one_chunk else self.n

    def shared(self, name: str) -> int:
        """The stream of B and Pi."""
        return 0 if self.one_chunk else stream_id(name)

    def g(self, name: str, block: int, chunk: int) -> np.ndarray:
        if self.diagonal == "gaussian":
            return gaussian(self.seed, stream_id(name), block, chunk, self.n)
        return signs(self.seed, stream_id(name), DIAGONAL, block, chunk, self.n)

    def b(self, name: str, chunk: int) -> np.ndarray:
        return signs(self.seed, self.shared(name), SIGNS, 0, chunk, self.n)

    def z(self, name: str, chunk: int, theta: np.ndarray) -> np.ndarray:
        padded, length = np.zeros(self.n, dtype=F), self.length()
        own = theta[chunk * length : (chunk + 1) * length]
        padded[: len(own)] = own
        h = walsh_hadamard(self.b(name, chunk) * padded)
        return np.array([h[k] for k in permutation(self.seed, self.shared(name), chunk, self.n)])

    def forward(self, name: str, theta: np.ndarray, factor: np.float32, base: np.ndarray) -> np.ndarray:
        """W0 + factor * H(sum over chunks of G z), with the scale inside `factor`; flat."""
        z = [self.z(name, chunk, theta) for chunk in range(self.chunks)]
        values = []
        for block in range(-(-len(base) // self.n)):
            first, *others = self.chunks_of(name, block)
            x = self.g(name, block, first) * z[first]
            for chunk in others:
                x = x + self.g(name, block, chunk) * z[chunk]
            values.append(factor * walsh_hadamard(x))
        return base + np.concatenate(values)[: len(base)]

    def adjoint(self, theta: np.ndarray, factors: dict, grads: dict) -> tuple:
        """(dtheta, dfactors), the blocks of a tensor added run by run, the runs group by group."""
        if self.one_chunk:
            return self.adjoint_of_one_chunk(theta, factors, grads)
        weights = sum(math.prod(shape) for shape in self.shapes.values())
        run_length, runs = min(22, max(1, weights // 2**14 // 108)), 2**14 // self.n
        dtheta, dfactors = np.zeros((self.chunks, self.n), dtype=F), []
        for name, grad in grads.items():
            padded = np.zeros(-(-len(grad) // self.n) * self.n, dtype=F)
            padded[: len(grad)] = grad
            u = np.zeros((self.chunks, self.n), dtype=F)
            blocks = padded.reshape(-1, self.n)
            for group in range(0, len(blocks), runs * run_length):
                of_group = np.zeros_like(u)
                for first in range(group, group + runs):
                    of_run = np.zeros_like(u)
                    for block in range(first, min(group + runs * run_length, len(blocks)), runs):
                        hg = walsh_hadamard(blocks[block], transposed=True)
                        for chunk in range(self.chunks):
                            of_run[chunk] += self.g(name, block, chunk) * hg
                    of_group += of_run
                u += of_group
            dot = F(0)
            for chunk in range(self.chunks):
                dot = dot + folded(u[chunk] * self.z(name, chunk, theta))
                scattered = np.zeros(self.n, dtype=F)
                scattered[permutation(self.seed, stream_id(name), chunk, self.n)] = u[chunk]
                back = self.b(name, chunk) * walsh_hadamard(scattered, transposed=True)
                dtheta[chunk] += factors[name] * back
            dfactors.append(dot)
        return dtheta.reshape(-1)[: self.dim], np.array(dfactors, dtype=F)

    def adjoint_of_one_chunk(self, theta: np.ndarray, factors: dict, grads: dict) -> tuple:
        """The blocks of a chunk, of all tensors, added run by run; all are in one group."""
        runs, dfactors = 2**14 // self.n, []
        z = [self.z("", chunk, theta) for chunk in range(self.chunks)]
        products = [[] for _ in range(self.chunks)]
        for name, grad in grads.items():
            padded = np.zeros(-(-len(grad) // self.n) * self.n, dtype=F)
            padded[: len(grad)] = grad
            lanes = np.zeros(256, dtype=F)
            for block, g in enumerate(padded.reshape(-1, self.n)):
                (chunk,) = self.chunks_of(name, block)
                drawn = self.g(name, block, chunk) * walsh_hadamard(g, transposed=True)
                products[chunk].append(factors[name] * drawn)
                sums = np.zeros((-(-self.n // 256), 16), dtype=F)
                for k, product in enumerate(drawn * z[chunk]):
                    sums[k >> 8, k % 16] += product
                lanes[block % 256] += folded(sums.reshape(-1))
            dfactors.append(folded(lanes))
        dtheta = np.zeros((self.chunks, self.n), dtype=F)
        for chunk, some in enumerate(products):
            assert len(some) <= runs
            u = np.zeros(self.n, dtype=F)
            for product in some:  # each the only one of its run
                u = u + (product + F(0))
            scattered = np.zeros(self.n, dtype=F)
            scattered[permutation(self.seed, 0, chunk, self.n)] = u
            dtheta[chunk] = self.b("", chunk) * walsh_hadamard(scattered, transposed=True)
        return dtheta[:, : self.length()].reshape(-1)[: self.dim], np.array(dfactors, dtype=F)


def folded(x: np.ndarray) -> np.float32:
    while len(x) > 1:  # the upper half onto the lower
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Rounded to nearest even."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


# --- known_answers.json

HOW_TO_READ = """
Known answers for an implementation of philox4x32-10.v1 (docs/rng.md). Values are float32 bit patterns in hexadecimal
unless said otherwise; seeds and ids are hexadecimal too. 'first' and 'last' are the first and last values of an array
in the order of positions; 'digest' is BLAKE2b with 16 bytes over the whole array's little-endian bytes: float32,
uint32 for permutations, bfloat16 and float16 where a key says so. A stream is named by its tensor; 'stream ids' shows
how names become ids (a label follows the name after a zero byte).
Inputs of 'z', 'forward' and 'adjoint', by flat index k, each one float32 division of two integers: theta[k] = ((37 k)
mod 101 - 50) / 99; base[k] = ((29 k) mod 97 - 48) / 95; grad[k] = ((31 k) mod 89 - 44) / 87. A tensor's 'factor' is
'lambda' times its scale 1 / sqrt(width D), one float32 product; it has the scale inside. With 'chunks' "one" each
block is made from one chunk, the scale is sqrt(chunks) as large, and z is that of every tensor.
'z' is Pi H B theta of one chunk; 'forward' is base + factor H(sum of G z); 'adjoint' has dtheta for all three
gradients and, for each tensor in order, dfactor = <u, z>, which is <grad, H(sum of G z)>.
"""

NAMES = ["a", "b", "c", "bert.embeddings.word_embeddings.weight", "classifier.weight", "größe.重み"]
LABELLED = ("bert.encoder.layer.0.attention.self.query.weight", "head 11")
HALVES = [0, 1, 2, 127, 160, 161, 1023, 8192, 16384, 24576, 32766, 32767, 32768, 32769, 40000, 65407, 65534, 65535]
STREAMS = [  # seed, name, block, chunk, n
    (0, "a", 0, 0, 32),
    (7, "classifier.weight", 3, 32767, 32),
    (0x0123456789ABCDEF, "c", 1, 1, 64),
    (2**63, "bert.embeddings.word_embeddings.weight", 89661, 1023, 1024),
    (2**64 - 1, "größe.重み", 2**28 - 1, 63, 16384),
]
PLANS = [  # dim, seed, width, diagonal, whether with one chunk a block
    (200, 7, 256, "gaussian"),
    (200, 7, 256, "rademacher"),
    (200, 2**64 - 1, 64, "gaussian"),
    (200, 2**64 - 1, 64, "rademacher"),
    (200, 7, 64, "gaussian", True),
    (200, 2**64 - 1, 64, "rademacher", True),
]
SHAPES = {"a": (40, 128), "b": (768,), "c": (3, 7)}
LAMBDAS = {"a": 1.0, "b": 0.5, "c": -2.0}


def sequence(count: int, factor: int, modulus: int) -> np.ndarray:
    return (np.arange(count) * factor % modulus - modulus // 2).astype(F) / F(modulus - 2)


def theta_of(dim: int) -> np.ndarray:
    return sequence(dim, 37, 101)


def base_of(shape: tuple) -> np.ndarray:
    return sequence(math.prod(shape), 29, 97)


def grad_of(shape: tuple) -> np.ndarray:
    return sequence(math.prod(shape), 31, 89)


def digest(x: np.ndarray) -> str:
    return hashlib.blake2b(x.astype(x.dtype.newbyteorder("<")).tobytes(), digest_size=16).hexdigest()


def patterns(x: np.ndarray) -> list[str]:
    return [f"{bits:08x}" for bits in x.view(np.uint32)]


def floats(x: np.ndarray) -> dict:
    return {"first": patterns(x[:4]), "last": patterns(x[-4:]), "digest": digest(x)}


def integers(x: np.ndarray) -> dict:
    return {"first": x[:8].astype(int).tolist(), "last": x[-8:].astype(int).tolist(), "digest": digest(x)}


def plan_answers(dim: int, seed: int, width: int, diagonal: str, one_chunk: bool = False) -> dict:
    model = Model(SHAPES, dim, seed, width, diagonal, one_chunk)
    theta, factors = theta_of(dim), {name: F(LAMBDAS[name]) * model.scale(name) for name in SHAPES}
    grads = {name: grad_of(shape) for name, shape in SHAPES.items()}
    forward = {}
    for name, shape in SHAPES.items():
        w = model.forward(name, theta, factors[name], base_of(shape))
        halves = {"bfloat16 digest": digest(bfloat16_bits(w)), "float16 digest": digest(w.astype(np.float16))}
        forward[name] = {"factor": patterns(factors[name][None])[0], **floats(w), **halves}
    dtheta, dfactors = model.adjoint(theta, factors, grads)
    return {
        "plan": {
            "dim": dim,
            "seed": f"{seed:016x}",
            "width": width,
            "diagonal": diagonal,
            **({"chunks": "one"} if one_chunk else {}),
            "shapes": SHAPES,
            "lambda": LAMBDAS,
        },
        "z": [{"tensor": "a", "chunk": c, **floats(model.z("a", c, theta))} for c in range(model.chunks)],
        "forward": forward,
        "adjoint": {"dtheta": floats(dtheta), "dfactors": patterns(dfactors)},
    }


def known_answers() -> dict:
    random123 = [  # kat_vectors of Random123 1.14: philox 4x32, 10 rounds
        ([0] * 2, [0] * 4, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([2**32 - 1] * 2, [2**32 - 1] * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0xA4093822, 0x299F31D0],
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    streams = []
    for seed, name, block, chunk, n in STREAMS:
        at = (seed, stream_id(name))
        streams.append(
            {
                "seed": f"{seed:016x}",
                "stream": name,
                "block": block,
                "chunk": chunk,
                "n": n,
                "gaussian diagonal": floats(gaussian(*at, block, chunk, n)),
                "rademacher diagonal": integers(signs(*at, DIAGONAL, block, chunk, n)),
                "signs B (block 0)": integers(signs(*at, SIGNS, 0, chunk, n)),
                "permutation": integers(permutation(*at, chunk, n)),
            }
        )
    every = np.array([normal(half) for half in range(65536)], dtype=F)
    hexes = lambda words: " ".join(f"{word:08x}" for word in words)  # noqa: E731
    return {
        "how to read": HOW_TO_READ.strip().split("\n"),
        "generator": "philox4x32-10.v1",
        "philox4x32-10": [{"key": hexes(k), "counter": hexes(c), "words": words} for k, c, words in random123],
        "stream ids": [
            *({"name": name, "id": f"{stream_id(name):016x}"} for name in NAMES),
            {"name": LABELLED[0], "label": LABELLED[1], "id": f"{stream_id(*LABELLED):016x}"},
        ],
        "normal table A": patterns(A),
        "normal table B": patterns(B),
        "normals": {f"{half:04x}": patterns(normal(half)[None])[0] for half in HALVES},
        "normals of all halves 0000 to ffff": {"digest": digest(every)},
        "streams": streams,
        "plans": [plan_answers(*plan) for plan in PLANS],
    }


def pretty(answers: dict) -> str:
    """JSON with short lists and dictionaries on one line."""
    text = json.dumps(answers, indent=1, ensure_ascii=False)
    for leaf in (r"\[[^][{}]{0,500}\]", r"\{[^{}]{0,300}\}"):
        text = re.sub(leaf, lambda match: re.sub(r"\n *", " ", match[0]), text)
    return text.replace("[ ", "[").replace(" ]", "]").replace("{ ", "{").replace(" }", "}") + "\n"


if __name__ == "__main__":
    KNOWN_ANSWERS.write_text(pretty(known_answers()), encoding="utf-8")
