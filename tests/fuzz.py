"""What the fuzzers share: seeded mutations of bytes, and the outcomes that are allowed."""

import random
import resource
import time
from collections.abc import Callable, Iterator

from tuner import InputError
from tuner.safe_text import printable

MOST = 500  # MB that a call may add to the peak memory of the process
TOKENS = (
    *("", "\0", "\x1b[31m", "\u202e", "\u0663", "\u7714", "\U0001f600", "nan", "inf", "-1", "1e999", "9" * 400),
    *('"', "'", ",", "\n", "\r", "=1+1", "../x", "${x}", "[", "]", "{", "}", "null", "&a [*a]", "1_0"),
)


def mutations(data: bytes, seed: int, n: int) -> Iterator[bytes]:
    """n damaged copies of a file's bytes. The i-th depends on data, seed and i only."""
    for i in range(n):
        draw, damaged = random.Random(f"{seed} {i}"), data
        for _ in range(draw.choice((1, 1, 1, 2, 8))):
            damaged = _damaged(damaged, draw)
        yield damaged


def _damaged(data: bytes, draw: random.Random) -> bytes:
    a, b = sorted(draw.randint(0, len(data)) for _ in range(2))
    before, chunk, after = data[:a], data[a : min(b, a + 64)], data[a + 1 :]
    ways = (
        lambda: before + bytes([(data + b"\0")[a] ^ 1 << draw.randrange(8)]) + after,  # a bit flips
        lambda: before + draw.randbytes(1) + after,
        lambda: before,
        lambda: before + data[draw.choice((b, a + len(chunk))) :],  # a piece is missing, short or long
        lambda: data[:b] + chunk * draw.choice((1, 2, 100)) + data[b:],  # a piece is repeated
        lambda: before + draw.choice((bytes(len(chunk)), draw.randbytes(len(chunk)))) + data[a + len(chunk) :],
        lambda: data.decode("latin-1").encode(draw.choice(("utf-16", "utf-8", "utf-8-sig", "utf-32-be"))),
        lambda: before + draw.choice(TOKENS).encode() + data[draw.choice((a, b, a + 1)) :],
    )
    return draw.choice(ways)()


def outcome(call: Callable[[], object], note: object = "") -> str:
    """ "success", or "InputError" if the call raises it in one legible line. Prints slow calls.

    note: the seed, and what else it takes to repeat the call; an AssertionError quotes it. That is raised for any other
    exception, for a message that a terminal might obey, and for a call that adds more than MOST to the peak memory.
    """
    memory, start, result = _peak(), time.perf_counter(), "success"
    try:
        call()
    except InputError as error:
        text = str(error)
        result = "InputError" if 0 < len(text) < 2000 and text == printable(text) else f"not a legible line: {text!r}"
    except BaseException as error:
        raise AssertionError(f"{note}: {type(error).__name__}: {error}") from error
    seconds, more = time.perf_counter() - start, _peak() - memory
    if seconds > 2:
        print(f"{note}: {seconds:.1f} s")
    assert result in ("success", "InputError") and more < MOST, f"{note}: {result}, {more:.0f} MB"  # noqa: PT018
    return result


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000  # MB, as Linux counts in kB
