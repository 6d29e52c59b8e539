"""Damaged files that tests of the core read."""

import random
import struct

import pytest


def _mutated(content: bytes, seed: int) -> bytes:
    """One to three changes: bits, bytes, pieces that are lost or doubled; often near an end, where headers are."""
    rng, data = random.Random(seed), bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        size = len(data)
        at = rng.choice((rng.randrange(size), rng.randrange(min(400, size)), size - 1 - rng.randrange(min(400, size))))
        length = rng.choice((1, 4, 50, size // 3))
        match rng.randrange(7):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + length] = rng.randbytes(len(data[at : at + length]))
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                data = data[: max(1, at)]
            case 5:
                data[at : at + 8] = struct.pack("<q", rng.choice((0, -1, 2**31, 2**62, 10**12)))[: len(data) - at]
            case 6:
                data[at : at + 4] = b"\xff" * len(data[at : at + 4])
        data = data or bytearray(1)
    return bytes(data)


@pytest.fixture(name="mutated", scope="session")
def mutated_fixture():
    """Damages the content of a file; see `_mutated`."""
    return _mutated
