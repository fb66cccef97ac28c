"""Which native engine runs."""

import os
import platform
import subprocess
import sys

from agent.core.engine import ENGINE, available_engines, native_engine


def test_the_engine_in_use_is_one_that_this_machine_has() -> None:
    assert available_engines()[native_engine()] == ENGINE


def test_scalar_is_always_there() -> None:
    assert "scalar" in available_engines()


def test_common_machines_do_not_fall_back_to_scalar() -> None:
    if platform.machine() in ("x86_64", "aarch64"):
        assert native_engine() in ("avx512", "avx2", "ssse3", "neon")


def test_an_engine_can_be_forced() -> None:
    program = "from agent.core.engine import native_engine; print(native_engine())"
    unknown = f"AGENT_SIMD: 'mmx' is no engine of this machine, so {native_engine()} is used. Set one of scalar"
    best = native_engine()
    for wanted, expected, said in (("scalar", "scalar", ""), ("mmx", best, unknown), ("", best, "")):
        env = {**os.environ, "AGENT_SIMD": wanted}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)
        assert done.stdout == f"{expected}\n"
        assert done.stderr.startswith(said) if said else not done.stderr
