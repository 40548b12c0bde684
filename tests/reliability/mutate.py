"""Damage for fuzzing: a mutation of bytes is a function of its seed."""

import random
import struct

HUGE = [struct.pack(f, n) for n in (2**15 - 1, 2**31 - 1, 2**32 - 1) for f in ("<I", ">I")] + [b"\xff" * 8, b"\0" * 8]


def mutated(content: bytes, seed: int, others: list[bytes] = ()) -> bytes:
    """One to four of: cut, bit flips, bytes overwritten, a part repeated, a part of another file, a huge number."""
    r, data = random.Random(seed), bytearray(content)
    for _ in range(r.randint(1, 4)):
        if not data:
            break
        at = r.randrange(len(data)) if r.random() < 0.5 else r.randrange(min(len(data), 512))  # headers come first
        size = r.choice((1, 2, 4, 16, 256))
        kind = r.randrange(7)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            for _ in range(r.choice((1, 1, 3, 20))):
                data[r.randrange(len(data))] ^= 1 << r.randrange(8)
        elif kind == 2:
            data[at : at + size] = r.randbytes(size)
        elif kind == 3:
            data[at:at] = data[at : at + size] * r.choice((1, 2, 50))
        elif kind == 4:
            del data[at : at + size]
        elif kind == 5 and others:
            other = r.choice(others)
            data[at:] = other[r.randrange(len(other)) :]
        else:
            number = r.choice(HUGE)
            data[at : at + len(number)] = number
    return bytes(data)
