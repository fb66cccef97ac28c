"""JSON that random bytes do not find, and that decoders raise other errors for: nested without end, or no UTF-8."""

from hypothesis import strategies as st

DEPTH = 20_000  # deeper than decoders follow
SPOILED = (b"[" * DEPTH, b'{"":' * DEPTH, b'"\xff"', b'{"\xff":0}', b'"\\ud800"')


def objects(*keys: str) -> st.SearchStrategy[bytes]:
    """Objects with such a value at one of their keys, or at another one."""
    names = st.sampled_from([*map(str.encode, keys), b"x"])
    return st.builds(lambda name, value: b'{"%b":%b}' % (name, value), names, st.sampled_from(SPOILED))
